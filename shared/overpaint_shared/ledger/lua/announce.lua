-- Makes a worker known for a while.
local id, name, record, ttl_s = unpack(ARGV)
work_when_full()
call('HSET', 'op:worker:' .. id, 'name', name, 'record', record)
call('PEXPIRE', 'op:worker:' .. id, math.ceil(ttl_s * 1000))
call('SADD', 'op:workers', id)
