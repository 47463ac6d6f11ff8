-- Makes a worker known for a while.
local id, name, record, ttl_s = unpack(ARGV)
work_when_full()
redis.call('HSET', 'op:worker:' .. id, 'name', name, 'record', record)
redis.call('PEXPIRE', 'op:worker:' .. id, math.ceil(ttl_s * 1000))
redis.call('SADD', 'op:workers', id)
