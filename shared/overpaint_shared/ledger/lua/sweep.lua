-- Removes records whose time is over, and every index entry of theirs: -> {how many, what was put aside}
-- Shortens the audit trail.
work_when_full()

local function is_over(job) return job.odd or TERMINAL[job.state] end

local ids = due_ids('op:expiry', clock(), ARGV[1])
each('op:expiry', ids, function(id)
  local job = read(id)
  if not (job and job.odd) then job = load_from('op:expiry', id, is_over) end
  if not job then return end
  unlink(job)
  call('DEL', 'op:job:' .. id, 'op:spec:' .. id, 'op:attempts:' .. id, 'op:said:' .. id)
end)
for _, key in ipairs({'op:audit', 'op:audit:producer'}) do call('LTRIM', key, -AUDIT_KEPT, -1) end
return {#ids, odd}
