-- What every script begins with. All keys share one hash tag, so that a Redis Cluster keeps them on one node.
-- Times are the server's own, in milliseconds: the clocks of the machines around it may differ.
local P = ARGV[1]

local function now()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function job_key(id) return P .. 'job:' .. id end
local function events_key(id) return P .. 'events:' .. id end
local function running_key(model) return P .. 'running:' .. model end
local function queue_key(priority, model) return P .. 'q:' .. priority .. ':' .. model end

-- What the record of a job says of these fields, by their names; nothing where there is no such job, or no longer.
local function read(id, ...)
  local names, job = {...}, {}
  for k, value in ipairs(redis.call('HMGET', job_key(id), ...)) do job[names[k]] = value or nil end
  return job
end

-- Wake whoever waits for news of a job: the API process that it came from, and others that asked. What was told, if it is
-- short, comes with it and needs not be asked for: payloads, the first of which has that number; the last may be final.
local function tell(id, home, first, payloads, final)
  local news = cmsgpack.pack({id, first or 0, payloads or {}, final == '1'})
  if home then redis.call('PUBLISH', home, news) end
  redis.call('PUBLISH', P .. 'news:' .. id, news)
end

-- A job begins to wait for a worker, in its place: into its queue and the books of its line; and one worker that waits for
-- jobs of its model is woken.
local function wait_for_worker(id, model, queue, place, tag, line, steps)
  redis.call('ZADD', queue, tag, place)
  redis.call('SADD', P .. 'unclaimed', id)
  redis.call('HINCRBY', P .. 'waiting', line .. ' jobs', 1)
  redis.call('HINCRBY', P .. 'waiting', line .. ' steps', steps)
  local bell = P .. 'bell:' .. model
  if redis.call('RPUSH', bell, 1) > 64 then redis.call('LPOP', bell) end
  redis.call('PEXPIRE', bell, 10000) -- whoever comes to wait later than that looks first
end

-- A job waits no longer: out of its queue and the books of its line. -> whether others wait there
local function wait_no_longer(id, queue, place, line, steps)
  redis.call('ZREM', queue, place)
  redis.call('SREM', P .. 'unclaimed', id)
  if redis.call('HINCRBY', P .. 'waiting', line .. ' jobs', -1) > 0 then
    redis.call('HINCRBY', P .. 'waiting', line .. ' steps', -steps)
  else
    redis.call('HDEL', P .. 'waiting', line .. ' jobs', line .. ' steps')
  end
  if redis.call('EXISTS', queue) == 1 then return true end
  redis.call('DEL', queue .. ':given', queue .. ':clock') -- nobody waits, so nobody is owed anything
  return false
end

-- What `finish` wants to know of a job.
local ENDING = {'state', 'model', 'entry', 'units', 'home', 'keep', 'queue', 'place', 'line', 'steps'}

-- The job is over: off its queue and out of the bound; what was told of it stays for a while.
local function finish(id, job, lost, first, payloads)
  redis.call('HSET', job_key(id), 'state', 'ended')
  if lost then redis.call('HSET', job_key(id), 'lost', lost) end
  if job.state == 'queued' then
    wait_no_longer(id, job.queue, job.place, job.line, job.steps)
  elseif job.state == 'running' then
    redis.call('XACK', running_key(job.model), 'workers', job.entry)
    redis.call('XDEL', running_key(job.model), job.entry)
  end
  if redis.call('ZREM', P .. 'active', id) == 1 then redis.call('DECRBY', P .. 'queued', job.units) end
  redis.call('PEXPIRE', job_key(id), job.keep)
  redis.call('PEXPIRE', events_key(id), job.keep)
  tell(id, job.home, first, payloads, '1')
end

-- The job, which entry of its model's stream `running` stands for, is this worker's now, as another attempt.
-- -> {job, attempt, deaths, deaths alone, milliseconds since it was submitted}
local function give(id, job, entry, worker, deaths, alone)
  local time, attempt = now(), job.attempt + 1
  local line = worker .. ' at ' .. time
  redis.call('HSET', job_key(id), 'state', 'running', 'worker', worker, 'entry', entry, 'attempt', attempt, 'began', '',
    'deaths', deaths, 'deaths_alone', alone, 'history', job.history and (job.history .. '\n' .. line) or line)
  return {job.job, attempt, deaths, alone, time - job.submitted}
end
