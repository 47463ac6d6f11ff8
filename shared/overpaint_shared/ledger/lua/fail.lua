-- Fails queued jobs that nobody can render: -> {ids, wake-ups}
local window, keep_s, fault = unpack(ARGV)
work_when_full()
local at, ids, lanes, out = clock(), {}, {}, {}

for i = 4, #ARGV do
  local job = load(ARGV[i])
  if job and job.state == 'queued' then
    set(job, 'error', fault)
    move(job, 'failed', at, keep_s)
    lanes[lane_of(job)] = true
    ids[#ids + 1] = job.id
  end
end
for lane in pairs(lanes) do top_up(lane, window, at, out) end
return {ids, out}
