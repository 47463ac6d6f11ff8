-- Looks through the indexes a piece at a time, whoever of the reapers comes first once in `every_s`: what does not belong
-- leaves them, and what is missing in them comes back: -> {ids that came back, what was put aside}
local every_s, lease_s, keep_s, piece = unpack(ARGV)
piece = tonumber(piece)
work_when_full()
local at, mended = clock(), {}
local HORIZON_S = math.max(3600, 10 * lease_s)

local last = call('HGET', 'op:scrub', 'at')
if is_time(last or nil) and tonumber(last) <= at and at - last < tonumber(every_s) then return {mended, odd} end
call('HSET', 'op:scrub', 'at', seconds(at))

-- The next piece of an index, with scores.
local function turn(index)
  local start = call('HGET', 'op:scrub', index)
  start = start and is_count(start) and tonumber(start) or 0
  local rows = call('ZRANGE', index, start, start + piece - 1, 'WITHSCORES')
  if #rows < 2 * piece then call('HDEL', 'op:scrub', index) else call('HSET', 'op:scrub', index, start + piece) end
  local ids, scores = {}, {}
  for i = 1, #rows, 2 do
    ids[#ids + 1] = rows[i]
    scores[rows[i]] = tonumber(rows[i + 1])
  end
  return ids, scores
end

local function add(index, score, id)
  if call('ZADD', index, 'NX', score, id) == 1 then mended[#mended + 1] = index .. ' ' .. id end
end

local function stand_in_line(job)
  local lane = lane_of(job)
  add('op:queued:' .. job.model, job.since, job.id)
  local sent = call('ZSCORE', 'op:sent:' .. lane, job.id)
  if not sent and not call('ZSCORE', 'op:wait:' .. lane, job.id) then add('op:wait:' .. lane, job.since, job.id) end
  call('ZADD', 'op:lanes', 'NX', 0, lane)
end

local function remember_token(job)
  local tokens = 'op:tokens:' .. job.owner
  if call('HGET', tokens, job.submit_token) then return end
  call('HSET', tokens, job.submit_token, job.id)
  mended[#mended + 1] = tokens .. ' ' .. job.id
end

-- Indexes of owners and groups whose jobs were met in this turn.
local met, many = {}, 0
local function meet(index, owner, group)
  if met[index] or many >= piece then return end
  met[index], many = {owner = owner, group = group}, many + 1
end

local function index(job)
  call('HGET', 'op:used:' .. job.owner, 'queued')  -- clears the way where it is of another type
  local owner = 'op:owner:' .. job.owner
  add(owner, job.created, job.id)
  meet(owner, job.owner)
  if job.group then
    local group = 'op:group:' .. job.owner .. ':' .. job.group
    add(group, job.created, job.id)
    meet(group, job.owner, job.group)
  end
  if job.submit_token then remember_token(job) end
  add('op:state:' .. job.state, job.created, job.id)
  if job.deadline and job.state == 'queued' then add('op:deadlines', job.deadline, job.id) end
  if job.state == 'queued' then
    stand_in_line(job)
  elseif LEASED[job.state] then
    add('op:leases', at + lease_s, job.id)  -- its owner has time to renew it
  else
    add('op:expiry', at + keep_s, job.id)
  end
end

local indexed = {}

-- Looks at a piece of an index: an entry that does not belong leaves it, and stands where it belongs.
local function look(key, belongs)
  local ids, scores = turn(key)
  each(key, ids, function(id)
    if key == 'op:expiry' and call('HGET', 'op:job:' .. id, 'odd') then return end
    local job, stray = load_from(key, id, belongs)
    job = job or stray
    if job and not indexed[id] then
      indexed[id] = true  -- once a turn: it stands in several indexes
      index(job)
    end
  end, true)
  return ids, scores
end

local function look_at_owners()
  local names = met
  met, many = {}, piece
  for key, name in pairs(names) do
    look(key, function(job) return job.owner == name.owner and (not name.group or job.group == name.group) end)
  end
end

local function look_at_leases()
  local ids, ends = look('op:leases', is_leased)
  for _, id in ipairs(ids) do
    if ends[id] > at + HORIZON_S and call('ZSCORE', 'op:leases', id) then
      put_aside('op:leases holds job ' .. id .. ' until ' .. ends[id], id)
      call('ZADD', 'op:leases', at + lease_s, id)
    end
  end
end

-- Lanes are visited in the order of their last visits, so none may lie in the future.
local function look_at_lanes()
  for _, lane in ipairs(call('ZRANGEBYSCORE', 'op:lanes', at + 60, '+inf', 'LIMIT', 0, piece)) do
    call('ZADD', 'op:lanes', 0, lane)
  end
end

local function look_at_fields(key, sound)
  local rows = call('HGETALL', key)
  for i = 1, #rows, 2 do
    if not sound(rows[i], rows[i + 1]) and put_aside(key .. ' holds ' .. rows[i] .. ': ' .. rows[i + 1], rows[i]) then
      call('HDEL', key, rows[i])
    end
  end
  return rows
end

local function is_kind(name, jobs)
  return MOVES[string.match(name, '^(%a+)|[^|]*|[^|]*$') or ''] ~= nil and is_count(jobs)
end

local function look_at_models(kinds)
  local seen = {}
  for i = 1, #kinds, 2 do
    local model = string.match(kinds[i], '^queued|([%w._-]+)|')
    if model and not seen[model] then
      seen[model] = true
      look('op:queued:' .. model, function(job) return is_queued(job) and job.model == model end)
    end
  end
end

local kinds = look_at_fields('op:census', is_kind)
look_at_fields('op:moves', is_kind)
look_at_fields('op:pace:since', function(_, since) return is_time(since) and tonumber(since) <= at + 60 end)
look_at_fields('op:unserved', function(_, watch) return string.match(watch, '^%d+%.?%d* %d+%.?%d*$') end)
call('SMEMBERS', 'op:workers')
look('op:deadlines', function(job) return job.deadline and not TERMINAL[job.state] end)
call('ZCARD', 'op:lost')
call('ZCARD', 'op:missed')
look_at_lanes()
look_at_leases()
look_at_models(kinds)
look('op:expiry', function(job) return TERMINAL[job.state] end)
for state in pairs(MOVES) do look('op:state:' .. state, function(job) return job.state == state end) end
look_at_owners()
return {mended, odd}
