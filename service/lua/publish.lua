-- prefix, id, worker, attempt, 'alone' or in 'company' of other jobs, final ('1' or '0'), payload ... -> 1, or 0 where the job is no longer this worker's
local id, worker, attempt, company, final = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local key = job_key(id)
local job = redis.call('HMGET', key, 'state', 'worker', 'attempt', 'home', 'told')
if job[1] ~= 'running' or job[2] ~= worker or job[3] ~= attempt then return 0 end
local last, number = #ARGV, tonumber(job[5])
redis.call('HSET', key, 'began', company, 'told', number + last - 6)
local first, short, bytes = number + 1, {}, 0
for k = 7, last do
  number = number + 1
  short[#short + 1], bytes = ARGV[k], bytes + #ARGV[k]
  redis.call('XADD', events_key(id), 'MAXLEN', '~', 4096, number .. '-0', 'p', ARGV[k], 'f', (k == last) and final or '0')
end
if bytes > 16384 then first, short = nil, nil end
if final == '1' then
  finish(id, nil, first, short)
else
  redis.call('PEXPIRE', events_key(id), redis.call('PTTL', key))
  tell(id, job[4], first, short, final)
end
return 1
