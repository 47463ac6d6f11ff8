-- Takes back jobs whose lease ran out; each counts one lost host: -> {ids, wake-ups, what was put aside}
local window, max_lost, keep_s, limit = unpack(ARGV)
work_when_full()
local at, ids, out = clock(), {}, {}

each('op:leases', call('ZRANGEBYSCORE', 'op:leases', '-inf', at, 'LIMIT', 0, limit), function(id)
  local job = load_from('op:leases', id, is_leased)
  if not job then return end
  ids[#ids + 1] = id
  if job.state == 'cancelling' then return move(job, 'cancelled', at, keep_s) end
  local lost = call('HINCRBY', 'op:job:' .. id, 'lost', 1)
  local fault = 'worker ' .. (job.worker_name or '?') .. ' stopped renewing its lease'
  set(job, 'fault', fault)
  if lost > tonumber(max_lost) then
    die(job, at, keep_s, 'engine_died', lost .. ' workers were lost while they rendered this job; last: ' .. fault)
  else
    come_back(job, at, out)
  end
end)
return {ids, out, odd}
