-- What ended: true costs instead of estimates, slots given back, requests no longer open, and the ledger.
-- KEYS: 1 the last batch of each gateway, then whatever is touched. ARGV[1], msgpack: time (as for admit.lua), the gateway, this batch's number,
-- then operations {kind, index of the key, ...}: 1 rate, more time | 2 slots, lease id ... | 3 quota, more, seconds to live |
-- 4 hash, seconds to live (0: as it is), field, count, field, count ... |
-- 5 rate, time taken while we were gone, what of it is left of a bucket that was empty before, a full bucket (store/charges.py).
-- A batch that was done already is not done again.
-- Answer: what could not be done, each with its key; one value that is not ours is no reason to lose the rest.
local asked = cmsgpack.unpack(ARGV[1])
local now = asked[1]
if now <= 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2] - now
end
if tonumber(redis.call('HGET', KEYS[1], asked[2]) or 0) >= asked[3] then return {} end
redis.call('HSET', KEYS[1], asked[2], asked[3])

local function fill(key, empty)
  if empty > now then
    redis.call('SET', key, string.format('%.17g', empty), 'PX', math.ceil((empty - now) / 1000) + 1000)
  else
    redis.call('DEL', key)
  end
end

local function apply(operation)
  local kind, key, more = operation[1], KEYS[operation[2]], operation[3]
  if kind == 1 then
    local empty = tonumber(redis.call('GET', key)) or 0
    -- What is over becomes debt of the same bucket; what is under comes back.
    if more > 0 then empty = math.max(empty, now) end
    fill(key, empty + more)
  elseif kind == 2 then
    redis.call('ZREM', key, unpack(operation, 3))
  elseif kind == 3 then
    local used = (tonumber(redis.call('GET', key)) or 0) + more
    redis.call('SET', key, string.format('%.17g', math.max(0, used)), 'EX', math.ceil(operation[4]) + 86400)
  elseif kind == 5 then
    local empty = tonumber(redis.call('GET', key)) or 0
    -- Never more than makes a bucket full: nobody pays for longer than that for what was admitted without us.
    fill(key, math.max(empty, math.min(math.max(empty + more, now + operation[4]), now + operation[5])))
  else
    for at = 4, #operation, 2 do
      if redis.call('HINCRBY', key, operation[at], operation[at + 1]) == 0 then redis.call('HDEL', key, operation[at]) end
    end
    if more > 0 then redis.call('EXPIRE', key, more) end
  end
end

local failed = {}
for n = 4, #asked do
  local done, problem = pcall(apply, asked[n])
  if not done then
    failed[#failed + 1] = KEYS[asked[n][2]] .. ': ' .. (type(problem) == 'table' and problem.err or tostring(problem))
  end
end
return failed
