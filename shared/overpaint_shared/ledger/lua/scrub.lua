-- Looks through the indexes a piece at a time, whoever of the reapers comes first once in `every_s`: what does not belong
-- leaves them, and what is missing in them comes back: -> {ids that came back, what was put aside}
local every_s, lease_s, keep_s, piece = unpack(ARGV)
piece = tonumber(piece)
work_when_full()
local at, mended = clock(), {}
local MOST_FIELDS, LONGEST_NAME = 10000, 200    -- of a hash of counts
local COUNT_S, MOST_COUNTED = 60, 10000         -- how often a state's jobs are counted, unless they are more
local MOST_COUNTED_ANEW = 200000                -- as many are counted after a flood
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

-- A hash with more fields than any farm makes was written by hand. It goes whole: to look at each field would take long.
local function is_flooded(key)
  local fields = #call('HKEYS', key)  -- HLEN is not among the rights of workers on a server that was started before
  if fields <= MOST_FIELDS then return false end
  put_aside(key .. ' has ' .. fields .. ' fields', '')
  call('DEL', key)
  return true
end

local function look_at_fields(key, sound)
  if is_flooded(key) then return {} end
  local rows = call('HGETALL', key)
  for i = 1, #rows, 2 do
    local fine = #rows[i] <= LONGEST_NAME and sound(rows[i], rows[i + 1])
    if not fine and put_aside(key .. ' holds ' .. rows[i] .. ': ' .. rows[i + 1], rows[i]) then
      call('HDEL', key, rows[i])
    end
  end
  return rows
end

local function is_kind(name, jobs)
  return MOVES[string.match(name, '^(%a+)|[^|]*|[^|]*$') or ''] ~= nil and is_count(jobs)
end

local function look_at_models(kinds)
  local seen, models = {}, {}
  for i = 1, #kinds, 2 do
    local model = string.match(kinds[i], '^queued|([%w._-]+)|')
    if model and not seen[model] then
      seen[model] = true
      models[#models + 1] = model
    end
  end
  table.sort(models)
  local from = call('HGET', 'op:scrub', 'models')
  from = from and is_count(from) and tonumber(from) < #models and tonumber(from) or 0
  call('HSET', 'op:scrub', 'models', from + piece < #models and from + piece or 0)
  for i = from + 1, math.min(from + piece, #models) do
    local model = models[i]
    look('op:queued:' .. model, function(job) return is_queued(job) and job.model == model end)
  end
end

-- Counts the jobs of a state: -> how many of each kind, what their owners use
local function counted(state)
  local kinds, used = {}, {}
  for _, id in ipairs(call('ZRANGE', 'op:state:' .. state, 0, -1)) do
    local is, model, features, owner, bytes, buried = unpack(call('HMGET', 'op:job:' .. id, 'state', 'model', 'features',
      'owner', 'bytes', 'odd'))
    if is == state and model and owner and not buried then
      local kind = kind_of(state, {model = model, features = features or ''})
      kinds[kind] = (kinds[kind] or 0) + 1
      bytes = is_count(bytes or '') and tonumber(bytes)  -- without: from before there were limits, so it is not counted
      local takes = used[owner] or {queued = 0, bytes = 0}
      if bytes then takes.queued, takes.bytes, used[owner] = takes.queued + 1, takes.bytes + bytes, takes end
    end
  end
  return kinds, used
end

local function correct(key, field, was, is)
  if tonumber(was or 0) == is then return end
  if is > 0 then call('HSET', key, field, is) else call('HDEL', key, field) end
  mended[#mended + 1] = key .. ' ' .. field
end

-- A count is wrong for good once a record is lost, or somebody has written it. So each state is counted anew from time
-- to time, unless that would take long.
local function count_again(rows, anew)
  local last = call('HGET', 'op:scrub', 'counted')
  if not anew and is_time(last or nil) and tonumber(last) <= at and at - last < COUNT_S then return end
  call('HSET', 'op:scrub', 'counted', seconds(at))
  local was = {}
  for i = 1, #rows, 2 do was[rows[i]] = rows[i + 1] end
  for state in pairs(MOVES) do
    if call('ZCARD', 'op:state:' .. state) <= (anew and MOST_COUNTED_ANEW or MOST_COUNTED) then
      local kinds, used = counted(state)
      for kind in pairs(was) do
        if string.find(kind, '^' .. state .. '|') and not kinds[kind] then correct('op:census', kind, was[kind], 0) end
      end
      for kind, jobs in pairs(kinds) do correct('op:census', kind, was[kind], jobs) end
      for owner, takes in pairs(state == 'queued' and used or {}) do
        local key = 'op:used:' .. owner
        for field, value in pairs(takes) do correct(key, field, call('HGET', key, field), value) end
      end
    end
  end
end

local anew = is_flooded('op:census')
look_at_fields('op:moves', is_kind)
look_at_fields('op:pace:since', function(_, since) return is_time(since) and tonumber(since) <= at + 60 end)
look_at_fields('op:unserved', function(_, watch) return string.match(watch, '^%d+%.?%d* %d+%.?%d*$') end)
call('SMEMBERS', 'op:workers')
look('op:deadlines', function(job) return job.deadline and not TERMINAL[job.state] end)
call('ZCARD', 'op:lost')
call('ZCARD', 'op:missed')
look_at_lanes()
look_at_leases()
look_at_models(call('HGETALL', 'op:census'))
look('op:expiry', function(job) return TERMINAL[job.state] end)
for state in pairs(MOVES) do look('op:state:' .. state, function(job) return job.state == state end) end
count_again(look_at_fields('op:census', is_kind), anew)
look_at_owners()
return {mended, odd}
