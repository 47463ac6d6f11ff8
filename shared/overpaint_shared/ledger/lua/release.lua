-- Takes a job back from the worker that holds `token`: -> {state now, wake-ups}
local id, token, reason, detail, window, max_crashes, keep_s, said, rest_s = unpack(ARGV)
work_when_full()
local at, out = clock(), {}
local job = load(id)
if not job then return {'', out} end
if job.token ~= token then return {job.state, out} end
if job.state == 'queued' then  -- the same call again, or the reaper was first
  if call('ZSCORE', 'op:sent:' .. lane_of(job), id) then wake(job, at, '1', out) end
  return {job.state, out}
end
if not LEASED[job.state] then return {job.state, out} end
if job.naming then  -- committed: a reaper is to store its picture under its name, now
  call('ZADD', 'op:leases', at, id)
  return {job.state, out}
end

if detail ~= '' then set(job, 'fault', detail) end
if job.state ~= 'cancelling' then note_end(job, at, reason, detail, said) end
if job.state == 'cancelling' then
  move(job, 'cancelled', at, keep_s)
elseif reason == 'crashed' or reason == 'fault' then
  local engine = reason == 'crashed'
  local count = call('HINCRBY', 'op:job:' .. id, engine and 'crashes' or 'faults', 1)
  if count > tonumber(max_crashes) then
    die(job, at, keep_s, engine and 'engine_died' or 'worker_fault',
      (engine and 'the engine of a worker died or hung ' or 'a worker itself failed ') .. count
      .. ' times with this job, last on ' .. (job.worker_name or '?') .. (detail ~= '' and ': ' .. detail or ''))
  else
    return_job(job, at, keep_s, out)
  end
else
  if reason == 'unable' then exclude(job, job.worker, at) end
  if reason == 'no_memory' then short_of_memory(job, at, tonumber(rest_s)) end
  if reason == 'suspected' then set(job, 'suspect', '1') end  -- not counted: the next attempt runs alone and shows it
  return_job(job, at, keep_s, out)
end
top_up(lane_of(job), window, at, out)
return {job.state, out}
