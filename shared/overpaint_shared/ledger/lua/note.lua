-- The audit trail: a line of JSON for each call that submits, cancels, replays, discards or fetches jobs (audit.py).
-- A producer may only append, to a list of its own, so nobody takes a line away and a producer's lines stay apart from
-- those of workers and operators. The reaper shortens the lists. A line that cannot be written never stops the call.
local AUDITED, NAMED, LONGEST_WHO, LONGEST_WORD = 20000, 5, 1200, 200

local function may(...) return not redis.acl_check_cmd or redis.acl_check_cmd(...) end

-- What the caller's Redis user may do, whatever the caller says of itself.
local function rights()
  if may('CONFIG', 'GET', 'x') then return 'operator' end
  return may('DEL', 'op:token') and 'worker' or 'producer'
end

local function short(text) return string.sub(tostring(text), 1, LONGEST_WORD) end

-- Appends a line about jobs: -> whether it could. `line` has owner, group, name, result, and how many it changed.
local function note(action, who, ids, line)
  local key, names = 'op:audit', {}
  line.rights = rights()
  if line.rights == 'producer' then key = 'op:audit:producer' end
  for i = 1, math.min(#ids, NAMED) do names[i] = short(ids[i]) end
  for name, value in pairs(line) do
    if type(value) == 'string' then line[name] = value ~= '' and short(value) or nil end
  end
  line.at, line.action, line.jobs, line.ids = clock(), short(action), #ids, names
  line.who = #who <= LONGEST_WHO and who or nil
  if not may('RPUSH', key, '') or not may('LLEN', key) then return false end
  local length = redis.pcall('LLEN', key)
  if type(length) ~= 'number' or length >= AUDITED then return false end
  return type(redis.pcall('RPUSH', key, cjson.encode(line))) == 'number'
end

-- Names the owner and the group of the jobs, where they are the same for all.
local function about(line, job)
  for _, name in ipairs({'owner', 'group'}) do
    local value = job[name] or ''
    if line[name] == nil then line[name] = value end
    if line[name] ~= value then line[name] = '' end
  end
end

local function note_one(action, who, id, job, result, changed)
  local line = {result = result, changed = changed}
  if job then about(line, job) end
  return note(action, who, {id}, line) and 1 or 0
end
