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

-- Wake whoever waits for news of a job: the API process that it came from, and others that asked. What was told, if it is
-- short, comes with it and needs not be asked for: payloads, the first of which has that number; the last may be final.
local function tell(id, home, first, payloads, final)
  local news = cmsgpack.pack({id, first or 0, payloads or {}, final == '1'})
  if home then redis.call('PUBLISH', home, news) end
  redis.call('PUBLISH', P .. 'news:' .. id, news)
end

-- A job begins to wait for a worker, in its place: into its queue and the books of its line; and one worker that waits for
-- jobs of its model is woken.
local function wait_for_worker(id, model, line, steps, queue, place, tag)
  redis.call('ZADD', queue, tag, place)
  redis.call('SADD', P .. 'queues', queue)
  redis.call('HSET', P .. 'lines', id, cjson.encode({line, steps, queue, place}))
  redis.call('HINCRBY', P .. 'waiting', line .. ' jobs', 1)
  redis.call('HINCRBY', P .. 'waiting', line .. ' steps', steps)
  local bell = P .. 'bell:' .. model
  if redis.call('RPUSH', bell, 1) > 64 then redis.call('LPOP', bell) end
  redis.call('PEXPIRE', bell, 10000) -- whoever comes to wait later than that looks first
end

-- -> whether others wait there
local function leave_queue(queue, place)
  redis.call('ZREM', queue, place)
  if redis.call('EXISTS', queue) == 1 then return true end
  redis.call('DEL', queue .. ':given', queue .. ':clock') -- nobody waits, so nobody is owed anything
  redis.call('SREM', P .. 'queues', queue)
  return false
end

-- Its line's books have it no longer. -> the queue and the place where it stands by them, nil where it did not wait
local function strike_off(id)
  local stood = redis.call('HGET', P .. 'lines', id)
  if not stood then return nil end
  local line, steps, queue, place = unpack(cjson.decode(stood))
  redis.call('HDEL', P .. 'lines', id)
  if redis.call('HINCRBY', P .. 'waiting', line .. ' jobs', -1) > 0 then
    redis.call('HINCRBY', P .. 'waiting', line .. ' steps', -steps)
  else
    redis.call('HDEL', P .. 'waiting', line .. ' jobs', line .. ' steps')
  end
  return queue, place
end

-- A job waits no longer. One that did not wait is no error.
local function wait_no_longer(id)
  local queue, place = strike_off(id)
  if queue then leave_queue(queue, place) end
end

-- The job is over: off its queue and out of the bound; what was told of it stays for a while.
local function finish(id, lost, first, payloads)
  local key = job_key(id)
  local job = redis.call('HMGET', key, 'model', 'entry', 'units', 'home', 'keep')
  redis.call('HSET', key, 'state', 'ended')
  if lost then redis.call('HSET', key, 'lost', lost) end
  if job[2] and job[2] ~= '' then
    redis.call('XACK', running_key(job[1]), 'workers', job[2])
    redis.call('XDEL', running_key(job[1]), job[2])
  end
  wait_no_longer(id)
  redis.call('ZREM', P .. 'active', id)
  if redis.call('HDEL', P .. 'units', id) == 1 then redis.call('DECRBY', P .. 'queued', job[3]) end
  redis.call('PEXPIRE', key, job[5])
  redis.call('PEXPIRE', events_key(id), job[5])
  tell(id, job[4], first, payloads, '1')
end

-- Entry of the stream `running` is in this worker's hands: make its job the worker's own, if it is still to be done.
-- -> {job, attempt, deaths, deaths alone, milliseconds since it was submitted} | false
local function give(stream, entry, id, worker, most)
  local key = job_key(id)
  local job = redis.call('HMGET', key, 'job', 'state', 'attempt', 'submitted', 'entry', 'cancelled', 'began', 'deaths',
    'deaths_alone', 'worker', 'history', 'queue')
  if not job[1] or job[2] == 'ended' or job[5] ~= entry then
    redis.call('XACK', stream, 'workers', entry)
    redis.call('XDEL', stream, entry)
    return false
  end
  if job[6] then -- while it was running, and its worker died before it heard
    finish(id, 'cancelled')
    return false
  end
  local time = now()
  local deaths, alone = tonumber(job[8] or '0'), tonumber(job[9] or '0')
  if job[2] == 'running' and job[10] == worker then -- it had been silent for too long, and is back
    return {job[1], tonumber(job[3]), deaths, alone, time - job[4]}
  end
  local attempt = tonumber(job[3]) + 1
  if job[2] == 'running' and job[7] ~= '' then -- its worker stopped in the middle of it
    deaths = deaths + 1
    if job[7] == 'alone' then alone = alone + 1 end
  end
  local history = job[11]
  if alone >= tonumber(most) then
    redis.call('XADD', P .. 'dead', 'MAXLEN', '~', 1000, '*', 'job', id, 'queue', job[12],
      'history', history or '', 'request', job[1])
    finish(id, most .. ' workers stopped while they worked on it alone')
    return false
  end
  local line = worker .. ' at ' .. time
  redis.call('HSET', key, 'state', 'running', 'worker', worker, 'attempt', attempt, 'began', '', 'deaths', deaths,
    'deaths_alone', alone, 'history', history and (history .. '\n' .. line) or line)
  return {job[1], attempt, deaths, alone, time - job[4]}
end
