-- Takes back jobs whose lease ran out; each counts one lost host. A job that is committed and only wants its
-- picture under its name is not rendered again: whoever asks is to do that, within a lease.
-- -> {ids, wake-ups, what was put aside, ids to be named}
local window, max_lost, keep_s, limit, lease_s = unpack(ARGV)
work_when_full()
local at, ids, out, unnamed = clock(), {}, {}, {}

each('op:leases', call('ZRANGEBYSCORE', 'op:leases', '-inf', at, 'LIMIT', 0, limit), function(id)
  local job = load_from('op:leases', id, is_leased)
  if not job then return end
  if job.naming then
    set(job, 'lease', seconds(at + lease_s))
    call('ZADD', 'op:leases', at + lease_s, id)
    unnamed[#unnamed + 1] = id
    return
  end
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
return {ids, out, odd, unnamed}
