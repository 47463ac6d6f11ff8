-- Visits the lanes that were visited longest ago: sends lost messages again, moves up who waits too long, fills free
-- places: -> {stale ids, wake-ups, suspects (id, model, features, excluded, seconds, fault), lanes}
local window, grace_s, age_s, max_lanes, limit = unpack(ARGV)
work_when_full()
local at, stale, out, suspects = clock(), {}, {}, {}
local SLACK_S = 2  -- a publisher may be this slow without its message being taken for lost

-- The stamp of the next message to be taken from a lane's list. A message that came back, was put in front, or is not
-- ours says nothing about what was lost: 0. An empty list says that all were.
local function next_stamp(class, model)
  local list = QUEUE_PREFIX .. model .. (class == '0' and '' or PRIORITY_SEPARATOR .. class)
  local raw = redis.call('LINDEX', list, -1)
  if not raw then return math.huge end
  local ok, stamp = pcall(function()
    local headers = cjson.decode(raw).headers
    return headers.redelivered and 0 or tonumber(headers.op_ts)
  end)
  return ok and stamp and stamp <= at and stamp or 0
end

local function suspect(job)
  for _, value in ipairs({job.id, job.model, job.features or '', job.excluded, seconds(at - job.unable_since),
    job.fault or ''}) do suspects[#suspects + 1] = value end
end

local function move_up(job)
  leave_lane(job)
  job.class = class_of(tonumber(job.class) - 1)
  set(job, 'class', job.class, 'since', seconds(at))
  wait(job, at)
  top_up(lane_of(job), window, at, out)
end

local function aged(job) return job.class ~= '0' and at - job.since >= tonumber(age_s) end

local function visit(lane, class, model)
  local sent, waiting, old = 'op:sent:' .. lane, 'op:wait:' .. lane, at - age_s
  local lost_before = math.max(0, math.min(at - grace_s, next_stamp(class, model) - SLACK_S))
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', sent, '-inf', lost_before, 'LIMIT', 0, limit)) do
    local job = load_from(sent, id)
    if job and job.excluded and job.unable_since then suspect(job) end
    if job and aged(job) then
      move_up(job)  -- which sends it a message; by the stamp of the lost one it would seem to have waited less
    elseif job then
      stale[#stale + 1] = id
      wake(job, at, '1', out)
    end
  end
  for _, key in ipairs(class == '0' and {} or {sent, waiting}) do
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', old, 'LIMIT', 0, limit)) do
      local job = load_from(key, id)
      if job and aged(job) then move_up(job) end
    end
  end
  top_up(lane, window, at, out)
  if redis.call('EXISTS', sent, waiting) == 0 then redis.call('ZREM', 'op:lanes', lane) end
end

local lanes = redis.call('ZRANGE', 'op:lanes', 0, max_lanes - 1)
for _, lane in ipairs(lanes) do
  redis.call('ZADD', 'op:lanes', at, lane)
  visit(lane, string.match(lane, '^(%d+):([^:]+):'))
end
return {stale, out, suspects, lanes}
