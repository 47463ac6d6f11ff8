-- Fails queued jobs that nobody can render: -> {ids, wake-ups, what was put aside}
local index, window, keep_s, fault = unpack(ARGV)
work_when_full()
local at, ids, lanes, out = clock(), {}, {}, {}

each(index, {unpack(ARGV, 5)}, function(id)
  local job = load_from(index, id, is_queued)
  if not job then return end
  set(job, 'error', fault)
  lanes[lane_of(job)] = true
  move(job, 'failed', at, keep_s)
  ids[#ids + 1] = id
end)
for lane in pairs(lanes) do top_up(lane, window, at, out) end
return {ids, out, odd}
