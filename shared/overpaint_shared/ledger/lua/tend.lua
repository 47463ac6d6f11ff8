-- Visits the lanes that were visited longest ago: sends lost messages again, moves up who waits too long, fills free
-- places: -> {stale ids, wake-ups, suspects (id, model, features, excluded, seconds, fault), lanes,
-- what was put aside}
local window, grace_s, age_s, max_lanes, limit = unpack(ARGV)
work_when_full()
local at, stale, out, suspects = clock(), {}, {}, {}
local OLDEST = 8
local SLACK_S = 2  -- a publisher may be this slow without its message being taken for lost

-- The stamp of the next message to be taken from a lane's list. A message that came back, was put in front, or is not
-- ours says nothing about what was lost: 0. An empty list says that all were.
local function next_stamp(class, model)
  local list = QUEUE_PREFIX .. model .. (class == '0' and '' or PRIORITY_SEPARATOR .. class)
  local raw = call('LINDEX', list, -1)
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

-- The oldest of a model's queued jobs say for how long it has waited: none of them may be odd.
local function look_at_oldest(model)
  local queued = 'op:queued:' .. model
  each(queued, call('ZRANGE', queued, 0, OLDEST - 1), function(id)
    load_from(queued, id, function(job) return is_queued(job) and job.model == model end)
  end)
end

local function visit(lane)
  local class, model = string.match(lane, '^(%d+):([%w._-]+):[^%z\1-\32]+$')
  if not CLASSES[class] then error('it is no lane') end
  call('ZADD', 'op:lanes', at, lane)
  look_at_oldest(model)
  local function stands_here(job) return is_queued(job) and lane_of(job) == lane end

  local sent, waiting, old = 'op:sent:' .. lane, 'op:wait:' .. lane, at - age_s
  local lost_before = math.max(0, math.min(at - grace_s, next_stamp(class, model) - SLACK_S))
  each(sent, call('ZRANGEBYSCORE', sent, '-inf', lost_before, 'LIMIT', 0, limit), function(id)
    local job = load_from(sent, id, stands_here)
    if not job then return end
    if job.excluded and job.unable_since then suspect(job) end
    if aged(job) then return move_up(job) end  -- which sends it a message; by the lost one's stamp it waited less
    stale[#stale + 1] = id
    wake(job, at, '1', out)
  end)
  for _, key in ipairs(class == '0' and {} or {sent, waiting}) do
    each(key, call('ZRANGEBYSCORE', key, '-inf', old, 'LIMIT', 0, limit), function(id)
      local job = load_from(key, id, stands_here)
      if job and aged(job) then move_up(job) end
    end)
  end
  top_up(lane, window, at, out)
  if call('EXISTS', sent, waiting) == 0 then call('ZREM', 'op:lanes', lane) end
end

local lanes = call('ZRANGE', 'op:lanes', 0, max_lanes - 1)
each('op:lanes', lanes, visit)
return {stale, out, suspects, lanes, odd}
