-- Notes a call in the audit trail: -> whether it did (1), could not (0), or, with `made`, left it to the caller (-1)
-- With `made` the line is written only if all jobs have a record: it stands in one pipeline with their submits.
local action, who, owner, group, name, result, changed, made = unpack(ARGV)
redis.pcall('DEL', 'op:nothing')  -- work_when_full, where that is allowed
local ids = {}
for i = 9, #ARGV do
  local there = made ~= '' and redis.pcall('HGET', 'op:job:' .. ARGV[i], 'state')
  if made ~= '' and type(there) ~= 'string' then return -1 end
  ids[#ids + 1] = ARGV[i]
end
changed = tonumber(changed) or 0
return note(action, who, ids, {owner = owner, group = group, name = name, result = result, changed = changed}) and 1 or 0
