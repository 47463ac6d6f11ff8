-- Takes back jobs whose lease ran out; each counts one lost host. A job that is committed and only wants its
-- picture under its name is not rendered again: whoever asks is to do that, within a lease.
-- -> {ids, wake-ups, what was put aside, ids to be named}
local window, max_lost, keep_s, limit, lease_s = unpack(ARGV)
work_when_full()
local at, ids, out, unnamed = clock(), {}, {}, {}

local due = call('ZRANGEBYSCORE', 'op:leases', '-inf', at, 'LIMIT', 0, limit)

-- How many workers were lost lately, those of the jobs that are due included.
local function workers_lost()
  for _, id in ipairs(due) do
    local job = read(id)
    if job and job.worker and LEASED[job.state] then call('ZADD', 'op:lost', at, job.worker) end
  end
  for _, worker in ipairs(call('ZRANGEBYSCORE', 'op:lost', '-inf', at - LOST_S, 'LIMIT', 0, limit)) do
    call('ZREM', 'op:lost', worker)
  end
  return call('ZCOUNT', 'op:lost', at - LOST_S, '+inf')
end

-- Notes one more loss of the job: -> all of them, those lately
local function count_loss(job)
  local times, recent = {string.format('%d', at)}, 1
  for time in string.gmatch(job.lost_at or '', '%d+') do
    if at - time < LOST_S and recent < 100 then
      recent = recent + 1
      times[recent] = time
    end
  end
  set(job, 'lost_at', table.concat(times, ' '))
  return call('HINCRBY', 'op:job:' .. job.id, 'lost', 1), recent
end

local farm_lost = workers_lost()
max_lost = tonumber(max_lost)

-- Whether the job is to blame. Where workers are lost that did not hold it, too, it may only have had bad luck.
local function kills_hosts(lost, recent)
  return recent > max_lost and 3 * recent > 2 * farm_lost or lost > LOST_IN_ALL * max_lost
end

each('op:leases', due, function(id)
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
  local lost, recent = count_loss(job)
  local fault = 'worker ' .. (job.worker_name or '?') .. ' stopped renewing its lease'
  set(job, 'fault', fault)
  note_end(job, at, 'lost', fault)
  if kills_hosts(lost, recent) then
    die(job, at, keep_s, 'engine_died', lost .. ' workers were lost while they rendered this job; last: ' .. fault)
  else
    return_job(job, at, keep_s, out)
  end
end)
return {ids, out, odd, unnamed}
