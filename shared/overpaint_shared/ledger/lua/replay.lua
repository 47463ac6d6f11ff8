-- Queues a failed or dead job again, as if it were new: -> {state now, moved, wake-ups, whether the call is in the audit trail}
local id, window, who = unpack(ARGV)
local at, out = clock(), {}
local job = load(id)
local function told(...) return note_one('replay', who, id, job, ...) end
if not job then return {'', 0, out, told('unknown_job', 0)} end
if not (TERMINAL[job.state] and MOVES[job.state].queued) then
  return {job.state, 0, out, told(job.state == 'queued' and 'ok' or 'refused', 0)}
end

job.attempt, job.class = nil, class_of(job.priority)
unset(job, 'attempt', 'crashes', 'faults', 'suspect', 'lost', 'lost_at', 'excluded', 'unable_since', 'fault', 'worker',
  'worker_name', 'started')
for _, name in ipairs(call('HKEYS', 'op:job:' .. id)) do if string.find(name, '^short:') then unset(job, name) end end
set(job, 'class', job.class)
if job.deadline_s then start_deadline(job, at) end
move(job, 'queued', at)
wait(job, at)
top_up(lane_of(job), window, at, out)
return {job.state, 1, out, told('ok', 1)}
