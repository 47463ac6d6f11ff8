-- Condemns a stored input to be deleted, unless a record may name it: -> {verdict, end of the deletion}
-- `since`: the caller has read the specs of all records of this owner that were made before. See inputs.py.
local owner, sha256, since, limit = unpack(ARGV)
work_when_full('op:nothing')
local at, key = clock(), 'op:condemned:' .. owner

local ends = call('ZSCORE', key, sha256)
if ends and tonumber(ends) >= at then return {'taken', ends} end

local made = call('ZRANGEBYSCORE', 'op:owner:' .. owner, since, '+inf', 'LIMIT', 0, limit + 1)
if #made > tonumber(limit) then return {'unread', ''} end
for _, id in ipairs(made) do
  local spec = redis.pcall('GET', 'op:spec:' .. id)
  if type(spec) == 'string' and string.find(spec, sha256, 1, true) then return {'named', ''} end
end

ends = seconds(at + CONDEMNED_S)
call('ZADD', key, ends, sha256)
call('EXPIRE', key, REMEMBERED_S + CONDEMNED_S)
return {'condemned', ends}
