-- prefix, id, worker, attempt, 'alone' or in 'company' of other jobs, final ('1' or '0'), payload ... -> 1, or 0 where the job is no longer this worker's
local id, worker, attempt, company, final = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local job = read(id, 'worker', 'attempt', 'told', unpack(ENDING))
if job.state ~= 'running' or job.worker ~= worker or job.attempt ~= attempt then return 0 end
local first, last = job.told + 1, job.told + #ARGV - 6
local short, bytes = {}, 0
for number = first, last do
  local payload = ARGV[number - job.told + 6]
  short[#short + 1], bytes = payload, bytes + #payload
  redis.call('XADD', events_key(id), 'MAXLEN', '~', 4096, number .. '-0', 'p', payload,
    'f', (number == last) and final or '0')
end
if bytes > 16384 then first, short = nil, nil end
if final == '1' then
  finish(id, job, nil, first, short)
else
  redis.call('HSET', job_key(id), 'began', company, 'told', last)
  tell(id, job.home, first, short, final)
end
return 1
