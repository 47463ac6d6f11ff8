-- What an owner may have waiting and submit. The limits are read from Redis, where producers cannot write them.
local NAMES, DEFAULTS = {'max_queued', 'max_spec_bytes', 'submits_per_s'}, {MAX_QUEUED, MAX_SPEC_BYTES, SUBMITS_PER_S}

local function limits_of(owner)
  local own, all = call('HMGET', 'op:limits:' .. owner, unpack(NAMES)), call('HMGET', 'op:limits', unpack(NAMES))
  local limits = {}
  for i, name in ipairs(NAMES) do
    limits[name] = DEFAULTS[i]
    for _, value in ipairs({all[i] or '', own[i] or ''}) do
      if is_count(value) then limits[name] = tonumber(value) end
    end
  end
  return limits
end

-- Takes one submit out of the owner's bucket, which holds those of BURST_S seconds: -> seconds until there is one
local function take(owner, per_s, at)
  local key = 'op:rate:' .. owner
  local left, since = string.match(call('GET', key) or '', '^(%d+%.?%d*) (%d+%.?%d*)$')
  if since and tonumber(since) > at + 1 then left = nil end  -- somebody wrote it by hand, or the clock was set back
  local full = per_s * BURST_S
  left = left and math.min(full, left + per_s * math.max(0, at - since)) or full
  if left < 1 then return (1 - left) / per_s end
  call('SET', key, string.format('%.6f %.6f', left - 1, at), 'EX', 2 * BURST_S)
  return 0
end

-- What is used, corrected by what stands in the owner's lanes. A count is too high where records were lost, or where
-- somebody has written it. With no job waiting it begins anew. Only a refusal asks this, since it looks at every lane.
local function corrected(owner, queued, waiting)
  local there = jobs_in_lanes(owner)
  if not there then return queued, waiting end
  if there > 0 then return math.min(there, queued), waiting end
  call('HDEL', 'op:used:' .. owner, 'queued', 'bytes')
  return 0, 0
end

-- The limit that one more job of so many bytes would break: -> its name, what it is, what is used, seconds to wait
local function broken_limit(owner, bytes, at)
  local limits = limits_of(owner)
  local used = call('HMGET', 'op:used:' .. owner, 'queued', 'bytes')
  local queued, waiting = tonumber(used[1] or 0) or 0, tonumber(used[2] or 0) or 0
  local function too_many() return limits.max_queued > 0 and queued >= limits.max_queued end
  local function too_long() return limits.max_spec_bytes > 0 and waiting + bytes > limits.max_spec_bytes end
  if too_many() or too_long() then queued, waiting = corrected(owner, queued, waiting) end
  if too_many() then return 'max_queued', limits.max_queued, queued, 0 end
  if too_long() then return 'max_spec_bytes', limits.max_spec_bytes, waiting, 0 end
  local wait_s = limits.submits_per_s > 0 and take(owner, limits.submits_per_s, at) or 0
  if wait_s > 0 then return 'submits_per_s', limits.submits_per_s, limits.submits_per_s, wait_s end
end
