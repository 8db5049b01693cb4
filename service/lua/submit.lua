-- prefix, id, queue, model, priority, job, units, limit, timeout ms, keep ms, home, idempotency key or '', digest, line, steps
-- -> {'queued'} | {'known', id} | {'taken'} | {'full', units queued}
local _, id, queue, model, priority, job, units, limit, timeout, keep, home, same, digest, line,
  steps = unpack(ARGV)
if same ~= '' then
  local known = redis.call('HMGET', P .. 'key:' .. same, 'digest', 'job')
  if known[1] == digest then return {'known', known[2]} end
  if known[1] then return {'taken'} end
end
local time = now()
local queued = tonumber(redis.call('GET', P .. 'queued') or '0')
if queued > 0 and queued + tonumber(units) > tonumber(limit) then
  return {'full', queued}
end
local lifetime = timeout + keep
redis.call('HSET', job_key(id), 'job', job, 'queue', queue, 'model', model, 'priority', priority, 'units', units,
  'home', home, 'keep', keep, 'state', 'queued', 'attempt', 0, 'told', 0, 'submitted', time, 'line', line, 'steps', steps)
wait_for_worker(id, line, steps)
redis.call('PEXPIRE', job_key(id), lifetime)
redis.call('HSET', job_key(id), 'entry', redis.call('XADD', queue, '*', 'job', id))
redis.call('SADD', P .. 'queues', queue)
redis.call('INCRBY', P .. 'queued', units)
redis.call('HSET', P .. 'units', id, units)
redis.call('ZADD', P .. 'active', time + timeout + 5000, id) -- its worker is to say first that it is too late
if same ~= '' then
  redis.call('HSET', P .. 'key:' .. same, 'digest', digest, 'job', id)
  redis.call('PEXPIRE', P .. 'key:' .. same, lifetime)
end
return {'queued'}
