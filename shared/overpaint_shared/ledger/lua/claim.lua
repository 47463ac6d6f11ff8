-- Gives a queued job to a worker: -> {ok, token, attempt, spec, owner, crashes, wake-ups, waited, suspect}, or {verdict, wake-ups}
local id, worker, asked, lease_s, window, keep_s, features, models = unpack(ARGV)
work_when_full()
local at, out, waited = clock(), {}, ''
local job = load(id)
if not job then return {'gone'} end

local function granted()
  return {'ok', job.token, job.attempt, call('GET', 'op:spec:' .. id) or '', job.owner, job.crashes or '0', out, waited,
    job.suspect or ''}
end

if job.state ~= 'queued' then
  if job.claimed_by == asked then return granted() end  -- the same call again: its reply was lost
  if LEASED[job.state] then return {'busy'} end        -- also when the lease ran out: the reaper counts that
  return {job.state == 'dead' and 'dead' or 'skip'}
end

local function offers(list, name) return list == '' or string.find(list, ',' .. name .. ',', 1, true) end

if is_late(job, at) then  -- the reaper is about to say so
  miss_deadline(job, at, keep_s)
  top_up(lane_of(job), window, at, out)
  return {'skip', out}
end
if not offers(models, job.model) then return {'skip'} end  -- a stray message; the job has one of its own
local able = not string.find(',' .. (job.excluded or '') .. ',', ',' .. worker .. ',', 1, true)
for feature in string.gmatch(job.features or '', '[^,]+') do able = able and offers(features, feature) end
if not able then exclude(job, worker, at) end
if not able or rests(job, worker, at) then
  -- This message is used up. The reaper sends another with its next round, so nothing spins.
  call('ZADD', 'op:sent:' .. lane_of(job), 'XX', 0, id)
  return {'skip'}
end

if not call('GET', 'op:spec:' .. id) then  -- somebody's DEL: nobody can render it
  put_aside('op:spec:' .. id .. ' is not there, so its job failed', id)
  set(job, 'error', cjson.encode({code = 'damaged_record', message = 'the spec of job ' .. id .. ' is no longer in Redis',
    fix = 'submit it anew'}))
  move(job, 'failed', at, keep_s)
  top_up(lane_of(job), window, at, out)
  return {'skip', out}
end

local queued = call('ZSCORE', 'op:queued:' .. job.model, id)
if queued then waited = seconds(math.max(0, at - queued)) end

-- Rises for ever, also past a crash of Redis that forgot its last second: never below the microseconds of the clock.
local count = call('INCR', 'op:token')
if count > at * 1e6 + 1e15 and put_aside('op:token is ' .. count, count) then count = 0 end  -- doubles end soon after
job.token = string.format('%.0f', math.max(count, math.floor(at * 1e6)))
call('SET', 'op:token', job.token)
job.attempt = tostring(tonumber(job.attempt or 0) + 1)
set(job, 'token', job.token, 'attempt', job.attempt, 'worker', worker, 'started', seconds(at), 'claimed_by', asked,
  'worker_name', call('HGET', 'op:worker:' .. worker, 'name') or worker, 'lease', seconds(at + lease_s))
unset(job, 'unable_since')
move(job, 'running', at)
call('ZADD', 'op:leases', at + lease_s, id)
top_up(lane_of(job), window, at, out)
return granted()
