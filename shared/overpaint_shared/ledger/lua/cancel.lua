-- Stops jobs: -> {state now of each, wake-ups, lanes that have free places}
-- A free place is given to the next job only where `fill` is not empty, with the last of many calls: else jobs that are
-- to be cancelled would get messages. After the count of lanes come those that the calls before left free, then the jobs.
local window, keep_s, fill, count = unpack(ARGV)
work_when_full('op:nothing')
local at, out, states, free = clock(), {}, {}, {}

for i = 5, 4 + count do free[ARGV[i]] = true end
for i = 5 + count, #ARGV do
  local job = load(ARGV[i])
  if job and job.state == 'queued' then
    free[lane_of(job)] = true
    move(job, 'cancelled', at, keep_s)
  elseif job and job.state == 'running' then
    move(job, 'cancelling', at)
  end
  states[#states + 1] = job and job.state or ''
end

local lanes = {}
for lane in pairs(free) do
  lanes[#lanes + 1] = lane
  if fill ~= '' then top_up(lane, window, at, out) end
end
return {states, out, lanes}
