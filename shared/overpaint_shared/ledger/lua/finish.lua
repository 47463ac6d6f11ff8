-- Commits how an attempt ended, from the current token alone: -> {accepted, state now, wake-ups}
local id, token, to, keep_s, window, result, fault = unpack(ARGV)
work_when_full()
local at, out = clock(), {}
local job = load(id)
if not job then return {0, '', out} end
if job.token ~= token then return {0, job.state, out} end
if job.state == 'cancelling' and to == 'failed' then to = 'cancelled' end
if not LEASED[job.state] then  -- accepted where it may be the same call again; a cancelled job's was a failure
  return {(job.state == to or (job.state == 'cancelled' and to == 'failed')) and 1 or 0, job.state, out}
end

if to == 'done' then set(job, 'result', result) end
if to == 'failed' then set(job, 'error', fault) end
move(job, to, at, keep_s)
top_up(lane_of(job), window, at, out)
return {1, job.state, out}
