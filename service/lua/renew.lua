-- prefix, worker, id, attempt, id, attempt, ... -> ids of those that this worker is to drop: another's by now, or unwanted
local worker, drop = ARGV[2], {}
for k = 3, #ARGV, 2 do
  local id = ARGV[k]
  local job = redis.call('HMGET', job_key(id), 'state', 'worker', 'attempt', 'queue', 'entry', 'cancelled')
  if job[1] == 'running' and job[2] == worker and job[3] == ARGV[k + 1] and not job[6] then
    redis.call('XCLAIM', job[4], 'workers', worker, 0, job[5], 'JUSTID')
  else
    drop[#drop + 1] = id
    if job[1] == 'running' and job[2] == worker and job[3] == ARGV[k + 1] then
      redis.call('XCLAIM', job[4], 'workers', worker, 0, job[5], 'JUSTID') -- it still has to say that it stopped
    end
  end
end
return drop
