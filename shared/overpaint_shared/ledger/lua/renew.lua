-- Renews the leases of a worker's jobs and tells their progress: -> a verdict for each of (id, token, stage, step, of)
local lease_s = ARGV[2]
work_when_full()
local at, verdicts = clock(), {}

for i = 3, #ARGV, 5 do
  local id, token, stage, step, of = unpack(ARGV, i, i + 4)
  local key = 'op:job:' .. id
  local state, current, owner, attempt, old_stage, old_step, old_of =
    unpack(redis.call('HMGET', key, 'state', 'token', 'owner', 'attempt', 'stage', 'step', 'of'))
  if LEASED[state] and current == token then
    redis.call('HSET', key, 'lease', seconds(at + lease_s))
    redis.call('ZADD', 'op:leases', at + lease_s, id)
    if stage ~= '' and (stage ~= old_stage or step ~= old_step or of ~= old_of) then
      redis.call('HSET', key, 'stage', stage, 'step', step, 'of', of)
      tell({id = id, state = state, owner = owner, attempt = attempt}, at, stage, tonumber(step), tonumber(of))
    end
    verdicts[#verdicts + 1] = state == 'running' and 'ok' or 'cancel'
  else
    verdicts[#verdicts + 1] = 'lost'
  end
end
return verdicts
