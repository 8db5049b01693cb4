-- prefix, worker, id, attempt, id, attempt, ... -> how many were queued again, in their old places. The attempt does not count.
local worker, count = ARGV[2], 0
for k = 3, #ARGV, 2 do
  local id = ARGV[k]
  local job = read(id, 'worker', 'attempt', 'cancelled', 'tag', unpack(ENDING))
  if job.state == 'running' and job.worker == worker and job.attempt == ARGV[k + 1] then
    if job.cancelled then
      finish(id, job, 'cancelled')
    else
      redis.call('XACK', running_key(job.model), 'workers', job.entry)
      redis.call('XDEL', running_key(job.model), job.entry)
      redis.call('HSET', job_key(id), 'state', 'queued', 'attempt', job.attempt - 1, 'worker', '')
      -- Its tag is one of another time where nobody has waited since and the clock was set back: then it stands in front.
      local tag = math.min(job.tag, redis.call('GET', job.queue .. ':clock') or 0)
      wait_for_worker(id, job.model, job.queue, job.place, tag, job.line, job.steps)
      count = count + 1
    end
  end
end
return count
