-- prefix, worker, id, attempt, id, attempt, ... -> ids of those that this worker is to drop: another's by now, or unwanted
local worker, drop = ARGV[2], {}
for k = 3, #ARGV, 2 do
  local id = ARGV[k]
  local job = read(id, 'state', 'worker', 'attempt', 'model', 'entry', 'cancelled')
  local mine = job.state == 'running' and job.worker == worker and job.attempt == ARGV[k + 1]
  if mine then -- an unwanted one as well: its worker still has to say that it stopped
    redis.call('XCLAIM', running_key(job.model), 'workers', worker, 0, job.entry, 'JUSTID')
  end
  if not mine or job.cancelled then drop[#drop + 1] = id end
end
return drop
