-- The deletion of a condemned input, which was to end at `ends`, has ended now.
local owner, sha256, ends = unpack(ARGV)
work_when_full('op:nothing')
local key = 'op:condemned:' .. owner
if tonumber(call('ZSCORE', key, sha256) or -1) == tonumber(ends) then call('ZADD', key, clock(), sha256) end
return 1
