-- What every script shares. A job is read with load() and changes its state through move() alone, which keeps
-- every index in step: so a job is in one place, and no caller can forget to publish.
--
--   op:job:<id>       hash, the record            op:spec:<id>      string, the job spec
--   op:state:<state>  zset by created             op:owner:<owner>, op:group:<owner>:<group>  zsets by created
--   op:queued:<model> zset by since when          op:leases         zset by end of lease
--   op:wait:<lane>    zset by since when: queued, no message yet   (lane = <class>:<model>:<owner>)
--   op:sent:<lane>    zset by stamp of its message: queued, has a message; 0 = that message is known to be lost
--   op:lanes          zset by last visit          op:expiry         zset by end of keeping
--   op:tokens:<owner> hash token -> job           op:token          the fencing counter, never reset
--   op:census         hash <state>|<model>|<method> -> records there now
--   op:moves          hash <state>|<model>|<method> -> how many ever came there, never reset
--   op:pace:<slice>   hash of these PACE_SLICE_S seconds: <model> -> jobs that ended after they ran,
--                     <model>|busy -> microseconds, told here, in which any of the model's jobs ran
--   op:condemned:<owner> zset SHA-256 of an input -> when its deletion ends or ended (inputs.py)
--   op:missed         zset job -> since when the reaper does not find its message
--   op:name:<owner> <key>  string `<created> <job>`, the job whose picture has this name
--   op:deadlines      zset by deadline: jobs that have one, until it passes or they end
--   op:lost           zset lost worker -> when it was missed
--   op:limits         hash of limits per owner, for all; op:limits:<owner> for one. Only workers and operators write
--   op:used:<owner>   hash queued, bytes: what the owner's queued jobs take of them (quota.lua)
--   op:rate:<owner>   string, submits that are left and when that was so
--   op:audit          list of the calls of workers and operators, as JSON; op:audit:producer of producers (note.lua)
--   op:scrub          hash, how far the reaper has looked through the indexes
--   op:quarantine     list of what was put aside, as JSON
--   op:attempts:<id>  list of how its last attempts ended, as JSON; op:said:<id> the last words of the engine
--   op:pace:leased:<model> zset by since when it runs; op:pace:since hash model -> from when on that is not told yet

local FIELDS = {'state', 'owner', 'model', 'priority', 'class', 'title', 'created', 'since', 'group', 'submit_token',
  'digest', 'token', 'attempt', 'crashes', 'lost', 'worker', 'worker_name', 'claimed_by', 'excluded', 'unable_since',
  'features', 'fault', 'odd', 'suspect', 'naming', 'lost_at', 'bytes', 'deadline', 'deadline_s'}
local TIMES, COUNTS = {'created', 'since'}, {'attempt', 'crashes', 'lost', 'bytes'}
local OPTIONAL_TIMES = {'unable_since', 'deadline', 'deadline_s'}
local LONGEST_FIELD, KEEP_ODD_S = 1048576, 604800
local CLASSES = {}
for _, class in ipairs(PRIORITY_CLASSES) do CLASSES[tostring(class)] = true end
local LEASED = {running = true, cancelling = true}

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function seconds(at) return string.format('%.6f', at) end

-- A full Redis refuses a script's first write, not its second. What ends or renews jobs must still work there.
-- Producers may not delete the workers' key, so none of them can run a worker's script.
local function work_when_full(key) redis.call('DEL', key or 'op:nothing:worker') end

local function class_of(priority)
  local class = PRIORITY_CLASSES[1]
  for _, step in ipairs(PRIORITY_CLASSES) do if step <= tonumber(priority) then class = step end end
  return tostring(class)
end

-- Why a record cannot be used, in words; nil for a sound one.
local function oddity(job)
  if job.odd then return job.odd end
  if not MOVES[job.state] then return 'its state is ' .. tostring(job.state) end
  if not job.model or #job.model > 64 or not string.find(job.model, '^[%w._-]+$') then return 'its model is no name' end
  if not job.owner or #job.owner > 512 or not string.find(job.owner, '^[^%z\1-\32]+$') then
    return 'its owner is no name'
  end
  if not CLASSES[job.class] then return 'its class is ' .. tostring(job.class) end
  if not string.find(job.priority or '', '^%d$') then return 'its priority is ' .. tostring(job.priority) end
  for _, name in ipairs(TIMES) do
    if not is_time(job[name]) then return 'its ' .. name .. ' is no time' end
  end
  for _, name in ipairs(OPTIONAL_TIMES) do
    if job[name] and not is_time(job[name]) then return 'its ' .. name .. ' is no time' end
  end
  for _, name in ipairs(COUNTS) do
    if job[name] and not is_count(job[name]) then return 'its ' .. name .. ' is no number' end
  end
  if job.token and not is_count(job.token, 19) then return 'its token is no number' end
  if job.length and job.length <= LONGEST_FIELD then return end
  for _, name in ipairs(FIELDS) do
    if job[name] and #job[name] > LONGEST_FIELD then return 'its ' .. name .. ' is too long' end
  end
end

local function set(job, ...) call('HSET', 'op:job:' .. job.id, ...) end
local function unset(job, ...) call('HDEL', 'op:job:' .. job.id, ...) end
local function lane_of(job) return job.class .. ':' .. job.model .. ':' .. job.owner end

-- A record as it stands, sound or not; nil where there is none.
local function read(id)
  local values = call('HMGET', 'op:job:' .. id, unpack(FIELDS))
  local job, length = {id = id}, nil  -- of all fields together
  for i = 1, #FIELDS do
    local value = values[i]
    if value then
      job[FIELDS[i]] = value
      length = (length or 0) + #value
    end
  end
  job.length = length
  return length and job or nil
end

local function tell(job, at, stage, step, of)
  redis.call('PUBLISH', 'op:events:' .. job.owner, cjson.encode({job = job.id, state = job.state,
    attempt = tonumber(job.attempt or 0), at = at, stage = stage, step = step, of = of}))
end

-- Counts for those who watch the farm, so that nobody need read every record.
local function kind_of(state, job)
  return state .. '|' .. job.model .. '|' .. (string.match(job.features or '', 'method:([^,]+)') or '')
end

local function count_out(job)
  local kind = kind_of(job.state, job)
  if call('HINCRBY', 'op:census', kind, -1) <= 0 then call('HDEL', 'op:census', kind) end
end

local function count_in(job, to)
  call('HINCRBY', 'op:census', kind_of(to, job), 1)
  call('HINCRBY', 'op:moves', kind_of(to, job), 1)
end

-- What an owner's queued jobs take of the limits. A record from before there were limits is counted when it is queued next.
local function count_use(job, to)
  local sign = (to == 'queued' and 1 or 0) - (job.state == 'queued' and 1 or 0)
  if sign == 0 or sign < 0 and not job.bytes then return end
  if not job.bytes then
    job.bytes = tostring(#(call('GET', 'op:spec:' .. job.id) or ''))
    call('HSET', 'op:job:' .. job.id, 'bytes', job.bytes)
  end
  local used = 'op:used:' .. job.owner
  if call('HINCRBY', used, 'queued', sign) <= 0 then return call('HDEL', used, 'queued', 'bytes') end
  call('HINCRBY', used, 'bytes', sign * job.bytes)
end

-- How many jobs stand in an owner's lanes; nil where the census names too many models to ask for each.
local MOST_MODELS = 256

local function jobs_in_lanes(owner)
  local models, count, jobs = {}, 0, 0
  for _, kind in ipairs(call('HKEYS', 'op:census')) do
    local model = string.match(kind, '^queued|([%w._-]+)|')
    if model and not models[model] then models[model], count = true, count + 1 end
    if count > MOST_MODELS then return nil end
  end
  for model in pairs(models) do
    for class in pairs(CLASSES) do
      local lane = class .. ':' .. model .. ':' .. owner
      jobs = jobs + call('ZCARD', 'op:wait:' .. lane) + call('ZCARD', 'op:sent:' .. lane)
    end
  end
  return jobs
end

-- Takes an id out of every index that its record leads to.
local function unlink(job)
  local id = job.id
  for state in pairs(MOVES) do
    if call('ZREM', 'op:state:' .. state, id) == 1 and state == job.state and job.model then
      count_out(job)
      if job.owner and is_count(job.bytes or '') then count_use(job, 'none') end
    end
  end
  call('ZREM', 'op:deadlines', id)
  call('ZREM', 'op:leases', id)
  call('ZREM', 'op:expiry', id)
  if job.owner then
    call('ZREM', 'op:owner:' .. job.owner, id)
    if job.group then call('ZREM', 'op:group:' .. job.owner .. ':' .. job.group, id) end
    local tokens = 'op:tokens:' .. job.owner
    if job.submit_token and call('HGET', tokens, job.submit_token) == id then call('HDEL', tokens, job.submit_token) end
  end
  if not job.model then return end
  call('ZREM', 'op:queued:' .. job.model, id)
  call('ZREM', 'op:pace:leased:' .. job.model, id)
  for class in pairs(job.owner and CLASSES or {}) do
    local lane = class .. ':' .. job.model .. ':' .. job.owner
    call('ZREM', 'op:wait:' .. lane, id)
    call('ZREM', 'op:sent:' .. lane, id)
  end
end

-- A record that cannot be used is kept for a person to look at, for a week, in no index but that of what expires.
local function bury(job, why)
  local lease = redis.pcall('ZSCORE', 'op:leases', job.id)
  if type(lease) == 'table' and lease.err and not string.find(lease.err, 'WRONGTYPE', 1, true) then return end
  if job.odd or not put_aside('op:job:' .. job.id .. ' cannot be used: ' .. why, cjson.encode(job)) then return end
  unlink(job)
  set(job, 'odd', why)
  call('ZADD', 'op:expiry', clock() + KEEP_ODD_S, job.id)
end

-- A job whose record is sound; nil for any other, which is put aside.
local function load(id)
  local job = read(id)
  local why = job and oddity(job)
  if why then bury(job, why) end
  if not why then return job end
end

-- The job that an index names and that belongs there. Any other entry leaves the index: -> nil, its job if that is sound
local function load_from(index, id, belongs)
  local job = load(id)
  if job and belongs(job) then return job end
  local says = job and 'names job ' .. id .. ', which is ' .. job.state or 'names ' .. id .. ', which is no job'
  if put_aside(index .. ' ' .. says, id) then call('ZREM', index, id) end
  return nil, job
end

-- The entries of an index whose time has come. Those of no job leave it here, many at once: anybody who holds a producer's
-- password can write them.
local PAGES = 16

local function due_ids(index, at, limit)
  local ids = {}
  for _ = 1, PAGES do
    local page = call('ZRANGEBYSCORE', index, '-inf', at, 'LIMIT', #ids, limit)
    for _, id in ipairs(page) do
      if call('EXISTS', 'op:job:' .. id) == 1 then
        ids[#ids + 1] = id
        if #ids == tonumber(limit) then return ids end
      else
        if #odd < QUARANTINED then put_aside(index .. ' names ' .. id .. ', which is no job', id) end
        call('ZREM', index, id)
      end
    end
    if #page < tonumber(limit) then break end
  end
  return ids
end

local function is_queued(job) return job.state == 'queued' end
local function is_leased(job) return LEASED[job.state] end

local function pace_slice(at, command, field, more)
  local slice = string.format('op:pace:%d', math.floor(at / PACE_SLICE_S))
  call(command, slice, field, more)
  call('EXPIRE', slice, PACE_SLICE_S * (PACE_SLICES + 1))
end

-- A job begins or ceases to run. Only seconds in which jobs ran say how fast they are rendered: a pause is no work.
local function count_busy(job, at, runs)
  local since, leased = call('HGET', 'op:pace:since', job.model), 'op:pace:leased:' .. job.model
  if since and not is_time(since) then
    put_aside('op:pace:since holds ' .. job.model .. ': ' .. since, since)
    since = false
  end
  if since then
    local told = string.format('%.0f', 1e6 * math.max(0, at - since))
    pace_slice(at, 'HINCRBY', job.model .. '|busy', told)
  end
  if runs then call('ZADD', leased, at, job.id) else call('ZREM', leased, job.id) end
  if call('ZCARD', leased) > 0 then
    call('HSET', 'op:pace:since', job.model, seconds(at))
  else
    call('HDEL', 'op:pace:since', job.model)
  end
end

local function wait(job, at)
  local lane = lane_of(job)
  call('ZADD', 'op:wait:' .. lane, at, job.id)
  call('ZADD', 'op:lanes', 'NX', 0, lane)
end

-- The job takes one of its lane's places and its message is due.
local function wake(job, at, front, out)
  local lane = lane_of(job)
  call('ZREM', 'op:wait:' .. lane, job.id)
  call('ZADD', 'op:sent:' .. lane, at, job.id)
  call('ZADD', 'op:lanes', 'NX', 0, lane)
  for _, value in ipairs({job.id, job.model, job.class, job.title or '', seconds(at), front}) do out[#out + 1] = value end
end

local function leave_lane(job)
  local lane = lane_of(job)
  call('ZREM', 'op:wait:' .. lane, job.id)
  call('ZREM', 'op:sent:' .. lane, job.id)
end

-- Fills the free places of a lane with those that wait longest. One call wakes a bounded number of jobs, since producers
-- say what `window` is. The reaper wakes the rest.
local MOST_WOKEN = 2048

local function top_up(lane, window, at, out)
  local room = math.min(tonumber(window) - call('ZCARD', 'op:sent:' .. lane), MOST_WOKEN - #out / 6)
  if room <= 0 then return end
  local waiting = 'op:wait:' .. lane
  for _, id in ipairs(call('ZRANGE', waiting, 0, room - 1)) do
    local job = load_from(waiting, id, function(job) return is_queued(job) and lane_of(job) == lane end)
    if job then wake(job, at, '0', out) end
  end
end

-- The one way to another state. `keep_s` is how long the record of an ended job is kept.
local function move(job, to, at, keep_s)
  if not MOVES[job.state][to] then error('illegal move of job ' .. job.id .. ': ' .. job.state .. ' to ' .. to) end
  call('ZREM', 'op:state:' .. job.state, job.id)
  call('ZADD', 'op:state:' .. to, job.created, job.id)
  count_out(job)
  count_in(job, to)
  count_use(job, to)
  if LEASED[job.state] ~= LEASED[to] then count_busy(job, at, LEASED[to]) end
  if LEASED[job.state] and TERMINAL[to] then pace_slice(at, 'HINCRBY', job.model, 1) end
  if job.state == 'queued' then
    leave_lane(job)
    call('ZREM', 'op:queued:' .. job.model, job.id)
  elseif LEASED[job.state] and not LEASED[to] then
    call('ZREM', 'op:leases', job.id)
    unset(job, 'lease', 'claimed_by', 'naming')
  elseif TERMINAL[job.state] then
    call('ZREM', 'op:expiry', job.id)
    unset(job, 'ended', 'result', 'error')
  end
  job.state = to
  if to == 'queued' then
    unset(job, 'stage', 'step', 'of')
    set(job, 'state', to, 'since', seconds(at))
    call('ZADD', 'op:queued:' .. job.model, at, job.id)
  elseif TERMINAL[to] then
    set(job, 'state', to, 'ended', seconds(at))
    if job.deadline then call('ZREM', 'op:deadlines', job.id) end
    call('ZADD', 'op:expiry', at + keep_s, job.id)
  else
    set(job, 'state', to)
  end
  tell(job, at)
end

-- How an attempt ended that did not finish its job, for a person who asks why.
local function note_end(job, at, how, detail, said)
  local key, keep_s = 'op:attempts:' .. job.id, 2592000
  call('RPUSH', key, cjson.encode({attempt = tonumber(job.attempt or 0), token = job.token, worker = job.worker_name,
    started = call('HGET', 'op:job:' .. job.id, 'started') or nil, ended = seconds(at), how = how, detail = detail}))
  call('LTRIM', key, -ENDS_KEPT, -1)
  call('EXPIRE', key, keep_s)
  if said and said ~= '' then call('SET', 'op:said:' .. job.id, said, 'EX', keep_s) end
end

-- A job that had its turn comes back: at once and to the front, whatever its lane's window says.
local function come_back(job, at, out)
  move(job, 'queued', at)
  wake(job, at, '1', out)
end

local function die(job, at, keep_s, code, message)
  set(job, 'error', cjson.encode({code = code, message = message, fix = 'see the worker\'s log, then replay the job'}))
  move(job, 'dead', at, keep_s)
end

local function start_deadline(job, at)
  job.deadline = seconds(at + job.deadline_s)
  set(job, 'deadline', job.deadline)
  call('ZADD', 'op:deadlines', job.deadline, job.id)
end

local function is_late(job, at) return job.deadline and tonumber(job.deadline) <= at end

local function late_error(job)
  local time = string.format('%g seconds', job.deadline_s)
  return cjson.encode({code = 'deadline', field = 'deadline_s', value = tonumber(job.deadline_s),
    message = (job.attempt or '0') == '0' and 'the job waited in the queue for all of its ' .. time
      or 'the job did not end within its ' .. time,
    fix = 'allow it more seconds, or replay it: then its seconds are counted from the start'})
end

-- A job whose time is over ends here, whether it waited or its attempt ended without a result.
local function miss_deadline(job, at, keep_s)
  set(job, 'error', late_error(job))
  move(job, 'failed', at, keep_s)
end

-- A job comes back, unless its time is over.
local function return_job(job, at, keep_s, out)
  if is_late(job, at) then miss_deadline(job, at, keep_s) else come_back(job, at, out) end
end

-- A worker that has no memory for a job now may have it later: `short:<worker>` is how often it had none, and until when
-- it is not asked. Beyond MOST_REFUSALS it never is.
local MOST_REFUSALS = 3

local function rests(job, worker, at)
  local ends = string.match(call('HGET', 'op:job:' .. job.id, 'short:' .. worker) or '', '^%d+ (%S+)$')
  return at < (tonumber(ends or 0) or 0)
end

local function exclude(job, worker, at)
  if not string.find(',' .. (job.excluded or '') .. ',', ',' .. worker .. ',', 1, true) then
    job.excluded = job.excluded and (job.excluded .. ',' .. worker) or worker
    set(job, 'excluded', job.excluded)
  end
  call('HSETNX', 'op:job:' .. job.id, 'unable_since', seconds(at))
end

local function short_of_memory(job, at, rest_s)
  local name = 'short:' .. (job.worker or '?')
  local count = tonumber(string.match(call('HGET', 'op:job:' .. job.id, name) or '', '^%d+') or 0) + 1
  set(job, name, string.format('%d %s', count, seconds(at + rest_s)))
  if job.worker and count >= MOST_REFUSALS then exclude(job, job.worker, at) end
end
