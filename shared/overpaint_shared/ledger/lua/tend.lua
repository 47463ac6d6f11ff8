-- Visits the lanes that were visited longest ago: sends lost messages again, takes those without work out of the lists,
-- moves up who waits too long, fills free places: -> {stale ids, wake-ups, suspects (id, model, features, excluded, seconds, fault), lanes,
-- what was put aside}
local window, grace_s, every_s, age_s, max_lanes, limit = unpack(ARGV)
grace_s = tonumber(grace_s)
work_when_full()
local at, stale, out, suspects = clock(), {}, {}, {}
local OLDEST = 8
local SCANNED = 2048     -- messages of a list that are read, the next to be taken
local LONGEST_ITEM = 65536
local EDGE = 16          -- of those that would be taken last
local FEW = 16           -- messages without work that may stay in a longer list
local CONFIRM_S = CONFIRMED * grace_s
local FORGET_S = 600

-- Which job a message names, and its stamp if that says when it was put into its list.
local function read_message(raw)
  if #raw > LONGEST_ITEM then return nil end
  local id = string.match(raw, '"id":%s*"([%w_-]+)"')
  local stamp = not string.find(raw, '"redelivered"', 1, true) and string.match(raw, '"op_ts":%s*(%d+%.?%d*)')
  return id, stamp and tonumber(stamp)
end

-- Takes messages without work, which were read from the end of a list, out of it. `kept` are the others, backwards.
local function drop(list, read, kept)
  call('LTRIM', list, 0, -(read + 1))
  for last = #kept, 1, -500 do
    local part = {}
    for i = last, math.max(1, last - 499), -1 do part[#part + 1] = kept[i] end
    call('RPUSH', list, unpack(part))
  end
end

-- The next messages of a model's list: the jobs that they name, and before which stamp no other message may lie.
local lists = {}
local function messages(class, model)
  local list = QUEUE_PREFIX .. model .. (class == '0' and '' or PRIORITY_SEPARATOR .. class)
  if lists[list] then return lists[list] end
  local raw, kept, found = call('LRANGE', list, -SCANNED, -1), {}, {named = {}, before = math.huge, more = false}
  for i = #raw, 1, -1 do
    local id, stamp = read_message(raw[i])
    if not id or not found.named[id] and call('ZSCORE', 'op:queued:' .. model, id) then kept[#kept + 1] = raw[i] end
    if id then found.named[id] = true end
    if #raw == SCANNED and i <= EDGE and stamp then found.before = math.min(found.before, stamp) end
  end
  local idle = #raw - #kept
  if idle >= FEW or idle > 0 and #raw <= 4 * FEW then drop(list, #raw, kept) end
  if #raw == SCANNED then
    found.more = true
    if found.before == math.huge then found.before = 0 end
  end
  lists[list] = found
  return found
end

-- Since when a job's message is missed: it is lost once it was missed for CONFIRM_S.
local function is_lost(id, stamp)
  if stamp == 0 then return true end
  local since = tonumber(call('ZSCORE', 'op:missed', id) or -1)
  if since < stamp then
    since = at
    call('ZADD', 'op:missed', at, id)
  end
  return at - since >= CONFIRM_S
end

local function forget_missed()
  for _, id in ipairs(call('ZRANGEBYSCORE', 'op:missed', '-inf', at - FORGET_S, 'LIMIT', 0, limit)) do
    call('ZREM', 'op:missed', id)
  end
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
  local found = messages(class, model)
  local rows = call('ZRANGEBYSCORE', sent, '-inf', math.min(at - (grace_s > 0 and SLACK_S or 0), found.before - SLACK_S),
    'WITHSCORES', 'LIMIT', 0, SCANNED + limit)
  local missed, stamps = {}, {}
  for i = 1, #rows, 2 do
    if not found.named[rows[i]] then missed[#missed + 1] = rows[i] end
    stamps[rows[i]] = tonumber(rows[i + 1])
  end
  each(sent, missed, function(id)
    if not is_lost(id, stamps[id]) then return end
    call('ZREM', 'op:missed', id)
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
  if not found.more and call('EXISTS', sent, waiting) == 0 then call('ZREM', 'op:lanes', lane) end
end

-- One reaper of all visits a lane in `every_s`.
local rows = call('ZRANGE', 'op:lanes', 0, max_lanes - 1, 'WITHSCORES')
local lanes, due = {}, {}
for i = 1, #rows, 2 do
  lanes[#lanes + 1] = rows[i]
  if tonumber(rows[i + 1]) <= at - every_s then due[#due + 1] = rows[i] end
end
each('op:lanes', due, visit)
forget_missed()
return {stale, out, suspects, lanes, odd}
