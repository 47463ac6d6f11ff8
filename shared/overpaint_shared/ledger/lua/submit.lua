-- Makes the record of a job and queues it, once: -> {created | there | conflict, id, wake-ups},
-- or {refused, id, [limit's name, what it is, what is used, seconds to wait]} where the owner has reached a limit,
-- or {gone, id, inputs that may have been deleted since they were seen}
local id, owner, window, token, digest, spec, model, priority, title, features, group, labels, inputs, checked,
  deadline_s = unpack(ARGV)
local LONGEST_INPUTS = 262144  -- a job's pictures and masks together name less than half of that
local at, out = clock(), {}

local known = token ~= '' and call('HGET', 'op:tokens:' .. owner, token)
local job = (known or #call('HKEYS', 'op:job:' .. id) > 0) and load(known or id)
if job then
  if job.digest ~= digest or job.owner ~= owner then return {'conflict', job.id, out} end
  -- The first call may have died before it published.
  if call('ZSCORE', 'op:sent:' .. lane_of(job), job.id) then wake(job, at, '0', out) end
  return {'there', job.id, out}
end

-- Anybody who holds a producer's password may call this, so no argument may keep the server busy.
if #inputs > LONGEST_INPUTS then return redis.error_reply('ERR no such job is taken: it names too many inputs') end

-- An input that was being deleted when the producer looked for it, or since, may be gone: it must look again.
local gone, seen = {}, tonumber(checked) or at - REMEMBERED_S  -- not told when: any that is remembered
local stale = checked ~= '' and at - seen > REMEMBERED_S
local condemned = inputs ~= '' and (stale or call('ZCOUNT', 'op:condemned:' .. owner, seen, '+inf') > 0)
for sha256 in string.gmatch(condemned and inputs or '', '[^,]+') do
  local ends = #sha256 == 64 and call('ZSCORE', 'op:condemned:' .. owner, sha256)
  if #sha256 == 64 and stale or ends and tonumber(ends) >= seen then gone[#gone + 1] = sha256 end
end
if #gone > 0 then return {'gone', id, gone} end

local limit, allowed, used, wait_s = broken_limit(owner, #spec, at)
if limit then return {'refused', id, {limit, tostring(allowed), tostring(used), tostring(wait_s)}} end

job = {id = id, owner = owner, model = model, class = class_of(priority), title = title, state = 'queued',
  features = features, priority = priority, since = seconds(at), bytes = tostring(#spec)}
job.created = seconds(at)
local why = oddity(job)
if why then return redis.error_reply('ERR no such job is taken: ' .. why) end
call('SET', 'op:spec:' .. id, spec)
local fields = {'state', job.state, 'owner', owner, 'model', model, 'priority', priority, 'class', job.class,
  'created', job.created, 'since', job.created, 'digest', digest, 'title', title, 'features', features, 'bytes', job.bytes}
local function also(name, value)
  if value == '' then return end
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end
also('submit_token', token)
also('group', group)
also('labels', labels)
set(job, unpack(fields))
if token ~= '' then
  call('HSET', 'op:tokens:' .. owner, token, id)
end
if group ~= '' then
  call('ZADD', 'op:group:' .. owner .. ':' .. group, at, id)
end
call('ZADD', 'op:owner:' .. owner, at, id)
call('ZADD', 'op:state:queued', at, id)
call('ZADD', 'op:queued:' .. model, at, id)
if deadline_s ~= '' then
  job.deadline_s = deadline_s
  set(job, 'deadline_s', deadline_s)
  start_deadline(job, at)
end
count_in(job, 'queued')
call('HINCRBY', 'op:used:' .. owner, 'queued', 1)
call('HINCRBY', 'op:used:' .. owner, 'bytes', job.bytes)
tell(job, at)
wait(job, at)
top_up(lane_of(job), window, at, out)
return {'created', id, out}
