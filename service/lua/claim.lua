-- prefix, worker, most deaths alone, ageing ms, wanted as JSON: {model: [tenants of whom the worker has enough]}
-- -> what `give` says, then whether more may be there of what is wanted (1 or 0) | nil
-- Of the first jobs of the queues, takes the one that came first; a batch job as if it had come `ageing` later. In a queue,
-- tenants take turns: see decision 9.
local _, worker, most, ageing, wanted = unpack(ARGV)

-- The first place of a queue that is no excluded tenant's. A place: its number, the time that it came, job, tenant.
local function first(queue, without)
  local from = 0
  while true do
    local places = redis.call('ZRANGE', queue, from, from + 15)
    for _, place in ipairs(places) do
      local time, id, tenant = string.match(place, '^%d+ (%d+) (%S+) (.*)$')
      if not without[tenant] then return tonumber(time), id, place end
    end
    if #places < 16 or from >= 256 then return nil end
    from = from + 16
  end
end

local found = {}
for model, enough in pairs(cjson.decode(wanted)) do
  local without = {}
  for _, tenant in ipairs(enough) do without[tenant] = true end
  for priority, later in pairs({interactive = 0, batch = tonumber(ageing)}) do
    local queue = queue_key(priority, model)
    local time, id, place = first(queue, without)
    if time then found[#found + 1] = {time + later, id, place, queue, model} end
  end
end
table.sort(found, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[3] < b[3]) end)
for k, best in ipairs(found) do
  local _, id, place, queue, model = unpack(best)
  local tag = tonumber(redis.call('ZSCORE', queue, place))
  strike_off(id)
  local others = leave_queue(queue, place) -- whatever the books say: a place that stayed would come first for ever
  if others then
    local clock = math.max(tonumber(redis.call('GET', queue .. ':clock') or '0'), tag)
    redis.call('SET', queue .. ':clock', clock)
    redis.call('ZREMRANGEBYSCORE', queue .. ':given', '-inf', clock) -- what was not asked for is not saved up
    redis.call('ZREMRANGEBYRANK', queue .. ':given', 0, -1001) -- of more tenants, those who were given the most
  end
  if redis.call('EXISTS', job_key(id)) == 1 then
    local stream = running_key(model)
    if redis.call('EXISTS', stream) == 0 then
      redis.call('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
      redis.call('SADD', P .. 'streams', stream)
    end
    local entry = redis.call('XADD', stream, '*', 'job', id)
    redis.call('HSET', job_key(id), 'entry', entry)
    redis.call('XCLAIM', stream, 'workers', worker, 0, entry, 'FORCE', 'JUSTID')
    local given = give(stream, entry, id, worker, most)
    if given then
      given[#given + 1] = (others or k < #found) and 1 or 0
      return given
    end
  end
end
return false
