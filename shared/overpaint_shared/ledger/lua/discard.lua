-- Removes the record of a failed or dead job, which nobody wants to replay: -> {state before, removed, whether the call is in the audit trail}
local id, who = unpack(ARGV)
work_when_full()
local job = load(id)
local function told(...) return note_one('discard', who, id, job, ...) end
if not job then return {'', 0, told('unknown_job', 0)} end
if not (TERMINAL[job.state] and MOVES[job.state].queued) then return {job.state, 0, told('refused', 0)} end

count_out(job)
call('ZREM', 'op:state:' .. job.state, id)
call('ZREM', 'op:expiry', id)
call('ZREM', 'op:owner:' .. job.owner, id)
if job.group then call('ZREM', 'op:group:' .. job.owner .. ':' .. job.group, id) end
local tokens = 'op:tokens:' .. job.owner
if job.submit_token and call('HGET', tokens, job.submit_token) == id then call('HDEL', tokens, job.submit_token) end
call('DEL', 'op:job:' .. id, 'op:spec:' .. id, 'op:attempts:' .. id, 'op:said:' .. id)
return {job.state, 1, told('ok', 1)}
