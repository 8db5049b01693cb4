-- What every script begins with. All keys share one hash tag, so that a Redis Cluster keeps them on one node.
-- Times are the server's own, in milliseconds: the clocks of the machines around it may differ.
local P = ARGV[1]

local function now()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function job_key(id) return P .. 'job:' .. id end
local function events_key(id) return P .. 'events:' .. id end

-- Wake whoever waits for news of a job: the API process that it came from, and others that asked.
local function tell(id, home)
  if home then redis.call('PUBLISH', home, id) end
  redis.call('PUBLISH', P .. 'news:' .. id, id)
end

-- A job begins to wait for a worker: into the books of its line.
local function wait_for_worker(id, line, steps)
  redis.call('HSET', P .. 'lines', id, steps .. ' ' .. line)
  redis.call('HINCRBY', P .. 'waiting', line .. ' jobs', 1)
  redis.call('HINCRBY', P .. 'waiting', line .. ' steps', steps)
end

-- A job waits no longer. One that did not wait is no error.
local function wait_no_longer(id)
  local stood = redis.call('HGET', P .. 'lines', id)
  if not stood then return end
  redis.call('HDEL', P .. 'lines', id)
  local steps, line = string.match(stood, '^(%d+) (.*)$')
  if redis.call('HINCRBY', P .. 'waiting', line .. ' jobs', -1) > 0 then
    redis.call('HINCRBY', P .. 'waiting', line .. ' steps', -steps)
  else
    redis.call('HDEL', P .. 'waiting', line .. ' jobs', line .. ' steps')
  end
end

-- The job is over: off its queue and out of the bound; what was told of it stays for a while.
local function finish(id, lost)
  local key = job_key(id)
  local job = redis.call('HMGET', key, 'queue', 'entry', 'units', 'home', 'keep')
  redis.call('HSET', key, 'state', 'ended')
  if lost then redis.call('HSET', key, 'lost', lost) end
  if job[2] then
    redis.call('XACK', job[1], 'workers', job[2])
    redis.call('XDEL', job[1], job[2])
  end
  wait_no_longer(id)
  redis.call('ZREM', P .. 'active', id)
  if redis.call('HDEL', P .. 'units', id) == 1 then redis.call('DECRBY', P .. 'queued', job[3]) end
  redis.call('PEXPIRE', key, job[5])
  redis.call('PEXPIRE', events_key(id), job[5])
  tell(id, job[4])
end
