-- prefix, most -> how many jobs were ended because their time was over and nobody had ended them
local late = redis.call('ZRANGEBYSCORE', P .. 'active', '-inf', now(), 'LIMIT', 0, ARGV[2])
for _, id in ipairs(late) do
  if redis.call('EXISTS', job_key(id)) == 1 then
    finish(id, 'its time was over before anybody had done it')
  else -- its record is gone: only the books are left to be put right
    wait_no_longer(id)
    local units = redis.call('HGET', P .. 'units', id)
    if units then
      redis.call('HDEL', P .. 'units', id)
      redis.call('DECRBY', P .. 'queued', units)
    end
    redis.call('ZREM', P .. 'active', id)
  end
end
return #late
