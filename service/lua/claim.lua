-- prefix, worker, ageing ms, wanted as JSON: {model: [tenants of whom the worker has enough]}
-- -> what `give` says, then whether more may be there of what is wanted (1 or 0) | nil
-- Of the first jobs of the queues, takes the one that came first; a batch job as if it had come `ageing` later. In a queue,
-- tenants take turns: see decision 9.
local _, worker, ageing, wanted = unpack(ARGV)

-- The first place of a queue that is no excluded tenant's, and its tag. A place: its number, the time that it came, job, tenant.
local function first(queue, without)
  local from = 0
  while true do
    local places = redis.call('ZRANGE', queue, from, from + 15, 'WITHSCORES')
    for k = 1, #places, 2 do
      local time, id, tenant = string.match(places[k], '^%d+ (%d+) (%S+) (.*)$')
      if not without[tenant] then return tonumber(time), id, places[k], tonumber(places[k + 1]) end
    end
    if #places < 32 or from >= 256 then return nil end
    from = from + 16
  end
end

-- The job is claimed by the worker in its model's stream. -> its entry there
local function enter(model, id, worker)
  local stream = running_key(model)
  local entry = redis.call('XADD', stream, 'NOMKSTREAM', '*', 'job', id)
  if not entry then
    redis.call('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
    redis.call('SADD', P .. 'streams', stream)
    entry = redis.call('XADD', stream, '*', 'job', id)
  end
  redis.call('XCLAIM', stream, 'workers', worker, 0, entry, 'FORCE', 'JUSTID')
  return entry
end

local found = {}
for model, enough in pairs(cjson.decode(wanted)) do
  local without = {}
  for _, tenant in ipairs(enough) do without[tenant] = true end
  for priority, later in pairs({interactive = 0, batch = tonumber(ageing)}) do
    local queue = queue_key(priority, model)
    local time, id, place, tag = first(queue, without)
    if time then found[#found + 1] = {time + later, id, place, tag, queue, model} end
  end
end
table.sort(found, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[3] < b[3]) end)
for k, best in ipairs(found) do
  local _, id, place, tag, queue, model = unpack(best)
  local job = read(id, 'job', 'attempt', 'submitted', 'deaths', 'deaths_alone', 'history', 'line', 'steps')
  if job.job then
    local others = wait_no_longer(id, queue, place, job.line, job.steps)
    if others then
      local clock = math.max(tonumber(redis.call('GET', queue .. ':clock') or '0'), tag)
      redis.call('SET', queue .. ':clock', clock)
      redis.call('ZREMRANGEBYSCORE', queue .. ':given', '-inf', clock) -- what was not asked for is not saved up
      redis.call('ZREMRANGEBYRANK', queue .. ':given', 0, -1001) -- of more tenants, those who were given the most
    end
    local given = give(id, job, enter(model, id, worker), worker, tonumber(job.deaths), tonumber(job.deaths_alone))
    given[#given + 1] = (others or k < #found) and 1 or 0
    return given
  end
  redis.call('ZREM', queue, place) -- somebody deleted its record: it must not come first for ever
  redis.call('SREM', P .. 'unclaimed', id)
end
return false
