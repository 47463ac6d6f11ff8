-- Gives a queued job to a worker: -> {ok, token, attempt, spec, owner, crashes, wake-ups, waited}, or {verdict}
local id, worker, call, lease_s, window, features, models = unpack(ARGV)
work_when_full()
local at, out, waited = clock(), {}, ''
local job = load(id)
if not job then return {'gone'} end

local function granted()
  return {'ok', job.token, job.attempt, redis.call('GET', 'op:spec:' .. id), job.owner, job.crashes or '0', out,
    waited}
end

if job.state ~= 'queued' then
  if job.claimed_by == call then return granted() end  -- the same call again: its reply was lost
  if LEASED[job.state] then return {'busy'} end        -- also when the lease ran out: the reaper counts that
  return {job.state == 'dead' and 'dead' or 'skip'}
end

local function offers(list, name) return list == '' or string.find(list, ',' .. name .. ',', 1, true) end

if not offers(models, job.model) then return {'skip'} end  -- a stray message; the job has one of its own
local able = not string.find(',' .. (job.excluded or '') .. ',', ',' .. worker .. ',', 1, true)
for feature in string.gmatch(job.features or '', '[^,]+') do able = able and offers(features, feature) end
if not able then
  exclude(job, worker, at)
  -- This message is used up. The reaper sends another with its next round, so nothing spins.
  redis.call('ZADD', 'op:sent:' .. lane_of(job), 'XX', 0, id)
  return {'skip'}
end

local queued = redis.call('ZSCORE', 'op:queued:' .. job.model, id)
if queued then waited = seconds(math.max(0, at - queued)) end

-- Rises for ever, also past a crash of Redis that forgot its last second: never below the microseconds of the clock.
job.token = string.format('%.0f', math.max(redis.call('INCR', 'op:token'), math.floor(at * 1e6)))
redis.call('SET', 'op:token', job.token)
job.attempt = tostring(tonumber(job.attempt or 0) + 1)
set(job, 'token', job.token, 'attempt', job.attempt, 'worker', worker, 'started', seconds(at), 'claimed_by', call,
  'worker_name', redis.call('HGET', 'op:worker:' .. worker, 'name') or worker, 'lease', seconds(at + lease_s))
unset(job, 'unable_since')
move(job, 'running', at)
redis.call('ZADD', 'op:leases', at + lease_s, id)
top_up(lane_of(job), window, at, out)
return granted()
