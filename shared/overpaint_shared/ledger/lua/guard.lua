-- What Redis holds may be damaged or hostile. An entry that cannot be used is put aside into op:quarantine and told,
-- and the work on the others goes on. Who may not write there (a producer) puts nothing aside: a worker's reaper does.

local QUARANTINED, LONGEST = 100, 400  -- entries kept, characters of each
local odd = {}                         -- what this call put aside, in words

-- At most LONGEST characters, printable ones alone.
local function shown(text)
  return (string.gsub(string.sub(tostring(text), 1, LONGEST), '[^\32-\126]', function(char)
    return string.format('\\x%02x', string.byte(char))
  end))
end

-- Whether the caller may do so.
local function put_aside(reason, item)
  local entry = cjson.encode({reason = shown(reason), item = shown(item)})
  local reply = redis.pcall('LPUSH', 'op:quarantine', entry)
  if type(reply) == 'table' and string.find(reply.err, 'WRONGTYPE', 1, true) then
    redis.call('DEL', 'op:quarantine')
    reply = redis.pcall('LPUSH', 'op:quarantine', entry)
  end
  if type(reply) == 'table' then return false end
  redis.pcall('LTRIM', 'op:quarantine', 0, QUARANTINED - 1)
  odd[#odd + 1] = shown(reason)
  return true
end

-- Takes what is in a command's way out of it: a key of another type, a counter that is no number. Who may not delete it
-- leaves it, and fails.
local function clear(fault, command, key, field)
  local counter = string.find(fault, 'not an integer', 1, true) or string.find(fault, 'would overflow', 1, true)
  if not counter and not string.find(fault, 'WRONGTYPE', 1, true) then return end
  local text = redis.pcall('GET', key)
  local hash = counter and command == 'HINCRBY'
  local gone = hash and redis.pcall('HDEL', key, field) or not hash and redis.pcall('DEL', key)
  if type(gone) == 'table' then return end
  local what = counter and (hash and key .. ' ' .. field or key) .. ' is no counter' or key .. ' is not of its type'
  put_aside(what, type(text) == 'string' and text or '')
end

-- redis.call, which first clears the way if it must. Any other error is raised by the second call as it is.
local function call(...)
  local reply = redis.pcall(...)
  if type(reply) ~= 'table' or not reply.err then return reply end
  clear(reply.err, ...)
  return redis.call(...)
end

local SERVERS = {'OOM ', 'used memory', 'READONLY', 'NOREPLICAS', 'MISCONF', 'MASTERDOWN', 'NOPERM', 'ACL failure',
  'can\'t run this command', 'can\'t access'}

-- Works on each entry of an index. One that fails is put aside, unless the server or the caller's rights are at fault.
-- With `stay` it stays in its index all the same: what looks at everything must not empty everything by a defect of ours.
local function each(index, ids, work, stay)
  for _, id in ipairs(ids) do
    local fine, fault = pcall(work, id)
    if not fine then
      local text = type(fault) == 'table' and fault.err or tostring(fault)
      for _, word in ipairs(SERVERS) do if string.find(text, word, 1, true) then error(fault, 0) end end
      put_aside(index .. ' names ' .. id .. ', which cannot be worked on: ' .. text, id)
      if not stay then call('ZREM', index, id) end
    end
  end
end

local function is_time(text) return text and #text <= 40 and string.find(text, '^%d+%.?%d*$') ~= nil end
local function is_count(text, digits) return #text <= (digits or 15) and string.find(text, '^%d+$') ~= nil end
