-- prefix, worker, id, attempt, id, attempt, ... -> ids of those that this worker is to drop: another's by now, or unwanted
local worker, drop = ARGV[2], {}
for k = 3, #ARGV, 2 do
  local id = ARGV[k]
  local job = redis.call('HMGET', job_key(id), 'state', 'worker', 'attempt', 'model', 'entry', 'cancelled')
  local mine = job[1] == 'running' and job[2] == worker and job[3] == ARGV[k + 1]
  if mine then -- an unwanted one as well: its worker still has to say that it stopped
    redis.call('XCLAIM', running_key(job[4]), 'workers', worker, 0, job[5], 'JUSTID')
  end
  if not mine or job[6] then drop[#drop + 1] = id end
end
return drop
