-- prefix, queue, entry, id, worker, most deaths alone -> {job, attempt, deaths, deaths alone, milliseconds since it was submitted} | nil
-- A worker was given this entry by its consumer group. It may be a job that is over, or one that has killed too many.
local _, queue, entry, id, worker, most = unpack(ARGV)
local key = job_key(id)
local job = redis.call('HMGET', key, 'job', 'state', 'attempt', 'submitted', 'entry', 'cancelled', 'began', 'deaths',
  'deaths_alone')
if not job[1] or job[2] == 'ended' or job[5] ~= entry then
  redis.call('XACK', queue, 'workers', entry)
  redis.call('XDEL', queue, entry)
  return false
end
if job[6] then -- while it was running, and its worker died before it heard
  finish(id, 'cancelled')
  return false
end
wait_no_longer(id)
local time = now()
local attempt = tonumber(job[3]) + 1
local deaths, alone = tonumber(job[8] or '0'), tonumber(job[9] or '0')
if job[2] == 'running' and job[7] ~= '' then -- its worker stopped in the middle of it
  deaths = deaths + 1
  if job[7] == 'alone' then alone = alone + 1 end
end
if alone >= tonumber(most) then
  local history = redis.call('HGET', key, 'history') or ''
  redis.call('XADD', P .. 'dead', 'MAXLEN', '~', 1000, '*', 'job', id, 'queue', queue, 'history', history, 'request', job[1])
  finish(id, most .. ' workers stopped while they worked on it alone')
  return false
end
local history = redis.call('HGET', key, 'history')
local line = worker .. ' at ' .. time
redis.call('HSET', key, 'state', 'running', 'worker', worker, 'attempt', attempt, 'began', '', 'deaths', deaths,
  'deaths_alone', alone, 'history', history and (history .. '\n' .. line) or line)
return {job[1], attempt, deaths, alone, time - job[4]}
