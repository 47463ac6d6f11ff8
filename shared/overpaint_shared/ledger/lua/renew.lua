-- Renews the leases of a worker's jobs and tells their progress: -> a verdict for each of (id, token, stage, step, of)
local lease_s = ARGV[2]
work_when_full()
local at, verdicts = clock(), {}

for i = 3, #ARGV, 5 do
  local id, token, stage, step, of = unpack(ARGV, i, i + 4)
  local job, key = load(id), 'op:job:' .. id
  if job and LEASED[job.state] and job.token == token then
    call('HSET', key, 'lease', seconds(at + lease_s))
    call('ZADD', 'op:leases', at + lease_s, id)
    local old = stage ~= '' and call('HMGET', key, 'stage', 'step', 'of')
    if old and (stage ~= old[1] or step ~= old[2] or of ~= old[3]) then
      call('HSET', key, 'stage', stage, 'step', step, 'of', of)
      tell(job, at, stage, tonumber(step), tonumber(of))
    end
    verdicts[#verdicts + 1] = job.state == 'running' and not is_late(job, at) and 'ok' or 'cancel'
  else
    verdicts[#verdicts + 1] = 'lost'
  end
end
return verdicts
