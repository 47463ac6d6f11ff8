-- Stops a job: -> {state now, wake-ups}
local id, window, keep_s = unpack(ARGV)
work_when_full()
local at, out = clock(), {}
local job = load(id)
if not job then return {'', out} end
if job.state == 'queued' then
  move(job, 'cancelled', at, keep_s)
  top_up(lane_of(job), window, at, out)
elseif job.state == 'running' then
  move(job, 'cancelling', at)
end
return {job.state, out}
