-- Commits how an attempt ended, from the current token alone: -> {accepted, state now, wake-ups, naming}
-- A job with a name for its picture is committed in two calls. With `name` the result is kept and the name is
-- taken; the job stays leased (`naming`) until its picture is stored under the name and the call comes without.
local id, token, to, keep_s, window, result, fault, name, keep_name_s = unpack(ARGV)
work_when_full()
local at, out = clock(), {}
local job = load(id)
if not job then return {0, '', out} end
if job.token ~= token then return {0, job.state, out} end
if job.state == 'cancelling' and to == 'failed' then to = 'cancelled' end
-- The worker stops a job whose time is over as it stops one that is cancelled. A result that is complete is kept.
if to == 'cancelled' and job.state ~= 'cancelling' and is_late(job, at) then to, fault = 'failed', late_error(job) end
if not LEASED[job.state] then  -- accepted where it may be the same call again; a cancelled job's was a failure
  return {(job.state == to or (job.state == 'cancelled' and to == 'failed')) and 1 or 0, job.state, out}
end

-- Of jobs with one name the one that was submitted last keeps it, whichever is rendered first.
local function take_name()
  local key = 'op:name:' .. job.owner .. ' ' .. name  -- an owner has no spaces
  local created, holder = string.match(call('GET', key) or '', '^(%S+) (%S+)$')
  created = tonumber(created or '')
  local mine = tonumber(job.created)
  if created and (created > mine or (created == mine and holder > id)) then return false end
  call('SET', key, job.created .. ' ' .. id, 'EX', keep_name_s)
  return true
end

if to == 'done' then set(job, 'result', result) end
if to == 'done' and name ~= '' and take_name() then
  set(job, 'naming', name)
  return {1, job.state, out, 1}
end
if to == 'done' then call('DEL', 'op:said:' .. id) end
if to == 'failed' then
  set(job, 'error', fault)
  note_end(job, at, 'failed', '')
end
move(job, to, at, keep_s)
top_up(lane_of(job), window, at, out)
return {1, job.state, out}
