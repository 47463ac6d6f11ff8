-- Condemns a stored input to be deleted, unless a record may name it: -> {verdict, end of the deletion}
-- `since`: the caller has read the specs of all records of this owner that were made before. See inputs.py.
local owner, sha256, since, limit = unpack(ARGV)
work_when_full('op:nothing')
if #sha256 ~= 64 or not string.find(sha256, '^%x+$') then return redis.error_reply('ERR it is no SHA-256 of an input') end
-- Anybody who holds a producer's password may call this, so it reads few specs and searches no long one.
limit = math.min(tonumber(limit) or 0, 50)
local LONGEST_SEARCHED = 1048576
local at, key = clock(), 'op:condemned:' .. owner

local ends = call('ZSCORE', key, sha256)
if ends and tonumber(ends) >= at then return {'taken', ends} end

local made = call('ZRANGEBYSCORE', 'op:owner:' .. owner, since, '+inf', 'LIMIT', 0, limit + 1)
if #made > limit then return {'unread', ''} end
for _, id in ipairs(made) do
  local spec = redis.pcall('GET', 'op:spec:' .. id)
  if type(spec) == 'string' and (#spec > LONGEST_SEARCHED or string.find(spec, sha256, 1, true)) then
    return {'named', ''}
  end
end

ends = seconds(at + CONDEMNED_S)
call('ZREMRANGEBYSCORE', key, '-inf', at - REMEMBERED_S)
call('ZADD', key, ends, sha256)
call('EXPIRE', key, REMEMBERED_S + CONDEMNED_S)
return {'condemned', ends}
