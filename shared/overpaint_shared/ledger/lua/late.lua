-- Fails queued jobs whose deadline has passed: -> {ids, wake-ups, what was put aside}
-- Those that run are stopped by their workers, which learn it from `renew`.
local window, keep_s, limit = unpack(ARGV)
work_when_full()
local at, ids, lanes, out = clock(), {}, {}, {}

local function has_deadline(job) return job.deadline and not TERMINAL[job.state] end

each('op:deadlines', due_ids('op:deadlines', at, limit), function(id)
  local job = load_from('op:deadlines', id, has_deadline)
  if not job then return end
  if not is_late(job, at) then return call('ZADD', 'op:deadlines', job.deadline, id) end
  call('ZREM', 'op:deadlines', id)
  if job.state ~= 'queued' then return end
  lanes[lane_of(job)] = true
  miss_deadline(job, at, keep_s)
  ids[#ids + 1] = id
end)
for lane in pairs(lanes) do top_up(lane, window, at, out) end
return {ids, out, odd}
