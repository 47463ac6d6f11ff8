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
--   op:pace:leased:<model> zset by since when it runs; op:pace:since hash model -> from when on that is not told yet

local FIELDS = {'state', 'owner', 'model', 'priority', 'class', 'title', 'created', 'since', 'group', 'submit_token',
  'digest', 'token', 'attempt', 'crashes', 'lost', 'worker', 'worker_name', 'claimed_by', 'excluded', 'unable_since',
  'features', 'fault'}
local LEASED = {running = true, cancelling = true}

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function seconds(at) return string.format('%.6f', at) end

-- A full Redis refuses a script's first write, not its second. What ends or renews jobs must still work there.
local function work_when_full() redis.call('DEL', 'op:nothing') end

local function class_of(priority)
  local class = PRIORITY_CLASSES[1]
  for _, step in ipairs(PRIORITY_CLASSES) do if step <= tonumber(priority) then class = step end end
  return tostring(class)
end

local function load(id)
  local values = redis.call('HMGET', 'op:job:' .. id, unpack(FIELDS))
  if not values[1] then return nil end
  local job = {id = id}
  for i, name in ipairs(FIELDS) do job[name] = values[i] or nil end
  return job
end

-- The job that an index names; an entry whose record is gone (somebody's DEL) goes too.
local function load_from(index, id)
  local job = load(id)
  if not job then redis.call('ZREM', index, id) end
  return job
end

local function set(job, ...) redis.call('HSET', 'op:job:' .. job.id, ...) end
local function unset(job, ...) redis.call('HDEL', 'op:job:' .. job.id, ...) end
local function lane_of(job) return job.class .. ':' .. job.model .. ':' .. job.owner end

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
  if redis.call('HINCRBY', 'op:census', kind, -1) <= 0 then redis.call('HDEL', 'op:census', kind) end
end

local function count_in(job, to)
  redis.call('HINCRBY', 'op:census', kind_of(to, job), 1)
  redis.call('HINCRBY', 'op:moves', kind_of(to, job), 1)
end

local function pace_slice(at, command, field, more)
  local slice = string.format('op:pace:%d', math.floor(at / PACE_SLICE_S))
  redis.call(command, slice, field, more)
  redis.call('EXPIRE', slice, PACE_SLICE_S * (PACE_SLICES + 1))
end

-- A job begins or ceases to run. Only seconds in which jobs ran say how fast they are rendered: a pause is no work.
local function count_busy(job, at, runs)
  local since, leased = redis.call('HGET', 'op:pace:since', job.model), 'op:pace:leased:' .. job.model
  if since then
    local told = string.format('%.0f', 1e6 * math.max(0, at - tonumber(since)))
    pace_slice(at, 'HINCRBY', job.model .. '|busy', told)
  end
  if runs then redis.call('ZADD', leased, at, job.id) else redis.call('ZREM', leased, job.id) end
  if redis.call('ZCARD', leased) > 0 then
    redis.call('HSET', 'op:pace:since', job.model, seconds(at))
  else
    redis.call('HDEL', 'op:pace:since', job.model)
  end
end

local function wait(job, at)
  local lane = lane_of(job)
  redis.call('ZADD', 'op:wait:' .. lane, at, job.id)
  redis.call('ZADD', 'op:lanes', 'NX', 0, lane)
end

-- The job takes one of its lane's places and its message is due.
local function wake(job, at, front, out)
  local lane = lane_of(job)
  redis.call('ZREM', 'op:wait:' .. lane, job.id)
  redis.call('ZADD', 'op:sent:' .. lane, at, job.id)
  redis.call('ZADD', 'op:lanes', 'NX', 0, lane)
  for _, value in ipairs({job.id, job.model, job.class, job.title or '', seconds(at), front}) do out[#out + 1] = value end
end

local function leave_lane(job)
  local lane = lane_of(job)
  redis.call('ZREM', 'op:wait:' .. lane, job.id)
  redis.call('ZREM', 'op:sent:' .. lane, job.id)
end

-- Fills the free places of a lane with those that wait longest.
local function top_up(lane, window, at, out)
  local room = tonumber(window) - redis.call('ZCARD', 'op:sent:' .. lane)
  if room <= 0 then return end
  local first = redis.call('ZPOPMIN', 'op:wait:' .. lane, room)
  for i = 1, #first, 2 do
    local job = load(first[i])
    if job then wake(job, at, '0', out) end
  end
end

-- The one way to another state. `keep_s` is how long the record of an ended job is kept.
local function move(job, to, at, keep_s)
  if not MOVES[job.state][to] then error('illegal move of job ' .. job.id .. ': ' .. job.state .. ' to ' .. to) end
  redis.call('ZREM', 'op:state:' .. job.state, job.id)
  redis.call('ZADD', 'op:state:' .. to, job.created, job.id)
  count_out(job)
  count_in(job, to)
  if LEASED[job.state] ~= LEASED[to] then count_busy(job, at, LEASED[to]) end
  if LEASED[job.state] and TERMINAL[to] then pace_slice(at, 'HINCRBY', job.model, 1) end
  if job.state == 'queued' then
    leave_lane(job)
    redis.call('ZREM', 'op:queued:' .. job.model, job.id)
  elseif LEASED[job.state] and not LEASED[to] then
    redis.call('ZREM', 'op:leases', job.id)
    unset(job, 'lease', 'claimed_by')
  elseif TERMINAL[job.state] then
    redis.call('ZREM', 'op:expiry', job.id)
    unset(job, 'ended', 'result', 'error')
  end
  set(job, 'state', to)
  job.state = to
  if to == 'queued' then
    unset(job, 'stage', 'step', 'of')
    set(job, 'since', seconds(at))
    redis.call('ZADD', 'op:queued:' .. job.model, at, job.id)
  elseif TERMINAL[to] then
    set(job, 'ended', seconds(at))
    redis.call('ZADD', 'op:expiry', at + keep_s, job.id)
  end
  tell(job, at)
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

local function exclude(job, worker, at)
  if not string.find(',' .. (job.excluded or '') .. ',', ',' .. worker .. ',', 1, true) then
    job.excluded = job.excluded and (job.excluded .. ',' .. worker) or worker
    set(job, 'excluded', job.excluded)
  end
  redis.call('HSETNX', 'op:job:' .. job.id, 'unable_since', seconds(at))
end
