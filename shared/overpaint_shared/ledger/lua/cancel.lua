-- Stops jobs: -> {state now of each, wake-ups, lanes that have free places, whether the call is in the audit trail}
-- A free place is given to the next job only where `fill` is not empty, with the last of many calls: else jobs that are
-- to be cancelled would get messages. After the count of lanes come those that the calls before left free, then the jobs.
local who, window, keep_s, fill, count = unpack(ARGV)
work_when_full('op:nothing')
local at, out, states, free = clock(), {}, {}, {}

local ids, line = {}, {changed = 0, result = 'unknown_job'}
for i = 6, 5 + count do free[ARGV[i]] = true end
for i = 6 + count, #ARGV do
  local job = load(ARGV[i])
  ids[#ids + 1] = ARGV[i]
  local runs = job and job.state == 'running' and not job.naming  -- a committed job cannot be stopped any more
  if job then
    line.result = 'ok'
    about(line, job)
    if job.state == 'queued' or runs then line.changed = line.changed + 1 end
  end
  if job and job.state == 'queued' then
    free[lane_of(job)] = true
    move(job, 'cancelled', at, keep_s)
  elseif runs then
    move(job, 'cancelling', at)
  end
  states[#states + 1] = job and job.state or ''
end

local lanes = {}
for lane in pairs(free) do
  lanes[#lanes + 1] = lane
  if fill ~= '' then top_up(lane, window, at, out) end
end
return {states, out, lanes, note('cancel', who, ids, line) and 1 or 0}
