-- Removes records whose time is over, and every index entry of theirs: -> how many
work_when_full()

local function remove(job)
  count_out(job)
  redis.call('ZREM', 'op:expiry', job.id)
  redis.call('ZREM', 'op:state:' .. job.state, job.id)
  redis.call('ZREM', 'op:owner:' .. job.owner, job.id)
  if job.group then redis.call('ZREM', 'op:group:' .. job.owner .. ':' .. job.group, job.id) end
  if job.submit_token then redis.call('HDEL', 'op:tokens:' .. job.owner, job.submit_token) end
  redis.call('DEL', 'op:job:' .. job.id, 'op:spec:' .. job.id)
end

local ids = redis.call('ZRANGEBYSCORE', 'op:expiry', '-inf', clock(), 'LIMIT', 0, ARGV[1])
for _, id in ipairs(ids) do
  local job = load_from('op:expiry', id)
  if job then remove(job) end
end
return #ids
