-- prefix, stream, entry, id, worker, most deaths alone -> what `give` says | nil
-- XAUTOCLAIM has given this worker an entry whose worker had not claimed it for too long.
local _, stream, entry, id, worker, most = unpack(ARGV)
local job = read(id, 'job', 'attempt', 'submitted', 'worker', 'began', 'deaths', 'deaths_alone', 'history', 'cancelled',
  unpack(ENDING))
if job.state ~= 'running' or job.entry ~= entry then
  redis.call('XACK', stream, 'workers', entry)
  redis.call('XDEL', stream, entry)
  return false
end
if job.cancelled then -- and its worker died before it heard
  finish(id, job, 'cancelled')
  return false
end
local deaths, alone = tonumber(job.deaths), tonumber(job.deaths_alone)
if job.worker == worker then -- it had been silent for too long, and is back
  return {job.job, tonumber(job.attempt), deaths, alone, now() - job.submitted}
end
if job.began ~= '' then -- its worker stopped in the middle of it
  deaths = deaths + 1
  if job.began == 'alone' then alone = alone + 1 end
end
if alone >= tonumber(most) then
  redis.call('XADD', P .. 'dead', 'MAXLEN', '~', 1000, '*', 'job', id, 'queue', job.queue, 'history', job.history,
    'request', job.job)
  finish(id, job, most .. ' workers stopped while they worked on it alone')
  return false
end
return give(id, job, entry, worker, deaths, alone)
