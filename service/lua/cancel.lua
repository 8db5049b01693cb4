-- prefix, id, why -> 1, or 0 where there is nothing to cancel
-- A queued job ends here; a running one when its worker hears of it, by the channel or with its next renewal.
local id, why = ARGV[2], ARGV[3]
local job = read(id, 'worker', unpack(ENDING))
if job.state == 'queued' then
  finish(id, job, why)
elseif job.state == 'running' then
  redis.call('HSET', job_key(id), 'cancelled', 1)
  redis.call('PUBLISH', P .. 'worker:' .. job.worker, id)
else
  return 0
end
return 1
