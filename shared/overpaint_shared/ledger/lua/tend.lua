-- Visits the lanes that were visited longest ago: sends lost messages again, takes those without work out of the lists,
-- moves up who waits too long, fills free places: -> {stale ids, wake-ups, suspects (id, model, features, excluded, seconds, fault), lanes,
-- what was put aside}
local window, grace_s, every_s, age_s, max_lanes, limit = unpack(ARGV)
grace_s = tonumber(grace_s)
work_when_full()
local at, stale, out, suspects = clock(), {}, {}, {}
local OLDEST = 8
local SCANNED = 2048     -- messages of a list that are read, the next to be taken
local SCANNED_BYTES, PIECE = 4194304, 8  -- no more of a list is read than this, a piece at a time: they may be long
local LISTED = 4096      -- lanes that are looked at in one call, to find some with work
local MET = 16           -- queued jobs whose lanes are visited out of turn
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

-- The messages of a list that would be taken next, those first: -> messages, whether the list holds more
local function read_list(list)
  local raw, bytes = {}, 0
  while #raw < SCANNED and bytes < SCANNED_BYTES do
    local part = call('LRANGE', list, -(#raw + PIECE), -(#raw + 1))
    for i = #part, 1, -1 do
      raw[#raw + 1] = part[i]
      bytes = bytes + #part[i]
    end
    if #part < PIECE then break end
  end
  return raw, call('LLEN', list) > #raw
end

-- The next messages of a model's list: the jobs that they name, and before which stamp no other message may lie.
local lists = {}
local function list_of(class, model)
  return QUEUE_PREFIX .. model .. (class == '0' and '' or PRIORITY_SEPARATOR .. class)
end

local function messages(class, model)
  local list = list_of(class, model)
  if lists[list] then return lists[list] end
  local raw, more = read_list(list)
  local kept, found = {}, {named = {}, before = math.huge, more = more}
  for i = 1, #raw do
    local id, stamp = read_message(raw[i])
    if not id or not found.named[id] and call('ZSCORE', 'op:queued:' .. model, id) then kept[#kept + 1] = raw[i] end
    if id then found.named[id] = true end
    if more and i > #raw - EDGE and stamp then found.before = math.min(found.before, stamp) end
  end
  local idle = #raw - #kept
  if idle >= FEW or idle > 0 and #raw <= 4 * FEW then drop(list, #raw, kept) end
  if more and found.before == math.huge then found.before = 0 end
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

local function parts_of(lane)
  local class, model, owner = string.match(lane, '^(%d+):([%w._-]+):([^%z\1-\32]+)$')
  if CLASSES[class] then return class, model, owner end
end

-- Whether a lane is worth a visit: jobs stand in it, or messages lie in its list, which it shares with no lane before it.
local seen = {}
local function has_work(class, model, lane)
  local list = list_of(class, model)
  local work = call('EXISTS', 'op:sent:' .. lane, 'op:wait:' .. lane) > 0 or not seen[list] and call('EXISTS', list) > 0
  if work then seen[list] = true end
  return work
end

-- A lane that has ended leaves; where it was its owner's last one, nothing of the owner is left to count.
local function leave(lane, owner)
  call('ZREM', 'op:lanes', lane)
  local used = 'op:used:' .. owner
  if call('HGET', used, 'queued') and jobs_in_lanes(owner) == 0 then call('HDEL', used, 'queued', 'bytes') end
end

local function visit(lane)
  local class, model, owner = parts_of(lane)
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
  if not found.more and call('EXISTS', sent, waiting) == 0 then leave(lane, owner) end
end

-- One reaper of all visits a lane in `every_s`.
local lanes, due, taken = {}, {}, {}
max_lanes = tonumber(max_lanes)

local function choose(lane, score)
  if taken[lane] then return end
  taken[lane] = true
  lanes[#lanes + 1] = lane
  if score <= at - every_s or score > at then due[#due + 1] = lane end
end

-- Anybody who holds a producer's password can write lanes. Those without work cost a look here, and no visit.
-- -> whether this has seen every lane
local function take_oldest()
  local rows = call('ZRANGE', 'op:lanes', 0, max_lanes - 1, 'WITHSCORES')
  for _ = max_lanes, LISTED, max_lanes do
    for i = 1, #rows, 2 do
      local lane = rows[i]
      local class, model = parts_of(lane)
      if class and has_work(class, model, lane) then
        choose(lane, tonumber(rows[i + 1]))
        if #lanes == max_lanes then return false end
      else
        if not class and #odd < QUARANTINED then put_aside('op:lanes names ' .. lane .. ', which is no lane', lane) end
        call('ZREM', 'op:lanes', lane)
      end
    end
    if #rows < 2 * max_lanes then return true end
    rows = call('ZRANGE', 'op:lanes', #lanes, #lanes + max_lanes - 1, 'WITHSCORES')
  end
end

-- The lanes of some queued jobs, of others in each call: so none waits until all that were written by hand had their turn.
local function take_met()
  local from = call('HGET', 'op:scrub', 'tended')
  from = from and is_count(from) and tonumber(from) or 0
  local ids = call('ZRANGE', 'op:state:queued', from, from + MET - 1)
  call('HSET', 'op:scrub', 'tended', #ids < MET and 0 or from + MET)
  for _, id in ipairs(ids) do
    local job = read(id)
    if job and not oddity(job) and is_queued(job) then
      choose(lane_of(job), tonumber(call('ZSCORE', 'op:lanes', lane_of(job)) or 0))
    end
  end
end

if not take_oldest() then take_met() end
each('op:lanes', due, visit)
forget_missed()
return {stale, out, suspects, lanes, odd}
