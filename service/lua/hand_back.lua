-- prefix, worker, id, attempt, id, attempt, ... -> how many were queued again, in their old places. The attempt does not count.
local worker, count = ARGV[2], 0
for k = 3, #ARGV, 2 do
  local id = ARGV[k]
  local key = job_key(id)
  local job = redis.call('HMGET', key, 'state', 'worker', 'attempt', 'model', 'entry', 'cancelled', 'line', 'steps', 'queue',
    'place', 'tag')
  if job[1] == 'running' and job[2] == worker and job[3] == ARGV[k + 1] then
    redis.call('XACK', running_key(job[4]), 'workers', job[5])
    redis.call('XDEL', running_key(job[4]), job[5])
    redis.call('HSET', key, 'state', 'queued', 'attempt', job[3] - 1, 'worker', '', 'entry', '')
    if job[6] then
      finish(id, 'cancelled')
    else
      wait_for_worker(id, job[4], unpack(job, 7))
      count = count + 1
    end
  end
end
return count
