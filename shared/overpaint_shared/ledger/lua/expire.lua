-- Takes back jobs whose lease ran out; each counts one lost host: -> {ids, wake-ups}
local window, max_lost, keep_s, limit = unpack(ARGV)
work_when_full()
local at, ids, out = clock(), {}, {}

for _, id in ipairs(redis.call('ZRANGEBYSCORE', 'op:leases', '-inf', at, 'LIMIT', 0, limit)) do
  local job = load_from('op:leases', id)
  if job then ids[#ids + 1] = id end
  if job and job.state == 'cancelling' then
    move(job, 'cancelled', at, keep_s)
  elseif job then
    local lost = redis.call('HINCRBY', 'op:job:' .. id, 'lost', 1)
    local fault = 'worker ' .. job.worker_name .. ' stopped renewing its lease'
    set(job, 'fault', fault)
    if lost > tonumber(max_lost) then
      die(job, at, keep_s, 'engine_died', lost .. ' workers were lost while they rendered this job; last: ' .. fault)
    else
      come_back(job, at, out)
    end
  end
end
return {ids, out}
