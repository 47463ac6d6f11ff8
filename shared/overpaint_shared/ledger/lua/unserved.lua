-- Watches models whose queue no live worker reads; a gap between two looks starts the watch anew:
-- -> the models that were seen so for `after_s`. After the count of unserved models come those, then the served ones.
local gap_s, after_s, count = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
work_when_full()
local at, overdue = clock(), {}

for i = 4, 3 + count do
  local first, last = string.match(call('HGET', 'op:unserved', ARGV[i]) or '', '^(%d+%.?%d*) (%d+%.?%d*)$')
  if not first or at - last > gap_s then first = seconds(at) end
  call('HSET', 'op:unserved', ARGV[i], first .. ' ' .. seconds(at))
  if at - first >= after_s then overdue[#overdue + 1] = ARGV[i] end
end
for i = 4 + count, #ARGV do call('HDEL', 'op:unserved', ARGV[i]) end
return overdue
