-- prefix, most, idle ms -> how many jobs were ended because their time was over and nobody had ended them
-- And what is left of workers that are gone: their names; a consumer without claims that has been silent for so long and announces
-- itself no longer; and streams that nobody reads.
local late = redis.call('ZRANGEBYSCORE', P .. 'active', '-inf', now(), 'LIMIT', 0, ARGV[2])
for _, id in ipairs(late) do
  local job = read(id, unpack(ENDING))
  if job.state then
    finish(id, job, 'its time was over before anybody had done it')
  else -- somebody deleted its record
    redis.call('ZREM', P .. 'active', id)
  end
end
for _, name in ipairs(redis.call('SMEMBERS', P .. 'workers')) do
  if redis.call('EXISTS', P .. 'worker:' .. name) == 0 then redis.call('SREM', P .. 'workers', name) end
end
for _, stream in ipairs(redis.call('SMEMBERS', P .. 'streams')) do
  local left = 0
  if redis.call('EXISTS', stream) == 1 then
    for _, told in ipairs(redis.call('XINFO', 'CONSUMERS', stream, 'workers')) do
      local consumer = {}
      for k = 1, #told, 2 do consumer[told[k]] = told[k + 1] end
      if consumer.pending == 0 and consumer.idle >= tonumber(ARGV[3])
        and redis.call('EXISTS', P .. 'worker:' .. consumer.name) == 0 then
        redis.call('XGROUP', 'DELCONSUMER', stream, 'workers', consumer.name)
      else
        left = left + 1
      end
    end
  end
  if left == 0 and redis.call('XLEN', stream) == 0 then
    redis.call('DEL', stream)
    redis.call('SREM', P .. 'streams', stream)
  end
end
return #late
