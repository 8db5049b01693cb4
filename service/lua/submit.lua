-- prefix, id, model, priority, tenant, job, units, limit, timeout ms, keep ms, home, idempotency key or '', digest, line, steps
-- -> {'queued'} | {'known', id} | {'taken'} | {'full', units queued}
local _, id, model, priority, tenant, job, units, limit, timeout, keep, home, same, digest, line, steps = unpack(ARGV)
if same ~= '' then
  local known = redis.call('HMGET', P .. 'key:' .. same, 'digest', 'job')
  if known[1] and redis.call('EXISTS', job_key(known[2])) == 1 then -- an answer may have gone before its key
    return known[1] == digest and {'known', known[2]} or {'taken'}
  end
end
if redis.call('EXISTS', job_key(id)) == 1 then return {'queued'} end -- asked again, since the answer was lost on its way
local time = now()
local queued = tonumber(redis.call('GET', P .. 'queued') or '0')
if queued > 0 and queued + tonumber(units) > tonumber(limit) then
  return {'full', queued}
end
-- Start-time fair queueing: its tag is where its tenant's turn has come to.
local queue = queue_key(priority, model)
local clock = tonumber(redis.call('GET', queue .. ':clock') or '0')
local tag = math.max(clock, tonumber(redis.call('ZSCORE', queue .. ':given', tenant) or '0'))
redis.call('ZADD', queue .. ':given', tag + units, tenant)
local place = string.format('%016d %d %s %s', redis.call('INCR', P .. 'places'), time, id, tenant)
redis.call('HSET', job_key(id), 'job', job, 'queue', queue, 'model', model, 'priority', priority, 'units', units,
  'home', home, 'keep', keep, 'state', 'queued', 'attempt', 0, 'deaths', 0, 'deaths_alone', 0, 'told', 0,
  'submitted', time, 'line', line, 'steps', steps, 'place', place, 'tag', tag)
wait_for_worker(id, model, queue, place, tag, line, steps)
redis.call('INCRBY', P .. 'queued', units)
redis.call('ZADD', P .. 'active', time + timeout + 5000, id) -- its worker is to say first that it is too late
if same ~= '' then
  redis.call('HSET', P .. 'key:' .. same, 'digest', digest, 'job', id)
  redis.call('PEXPIRE', P .. 'key:' .. same, timeout + keep)
end
return {'queued'}
