-- One decision: every limit of a request at once, or none. The same algorithm as gateway/access/limits/memory.py.
-- KEYS: 1 the gateway's open requests, then one a limit. ARGV[1], msgpack: time (0 or less: the server's, and so much more, as heartbeat.lua
-- says), lease id, lease length, what is open, then four numbers a limit: kind (1 rate, 2 slots, 3 quota), interval or amount, tolerance or
-- seconds to live, cost. Times in microseconds.
-- Answer: the limit in the way (0: granted), how long it will be, then what is left and the time to none used, for each limit.
local ask = cmsgpack.unpack(ARGV[1])
local now = ask[1]
if now <= 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2] - now
end
local refused, longest = 0, 0
local values = {}
for i = 1, #KEYS - 1 do
  local key, at = KEYS[i + 1], 4 * i
  local kind, one, two, cost = ask[at + 1], ask[at + 2], ask[at + 3], ask[at + 4]
  local wait = 0
  if kind == 1 then
    values[i] = math.max(tonumber(redis.call('GET', key)) or 0, now)
    wait = values[i] + cost * one - now - two
  elseif kind == 2 then
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    values[i] = redis.call('ZCARD', key)
    if values[i] >= one then wait = 1000000 end
  else
    values[i] = tonumber(redis.call('GET', key)) or 0
    if values[i] + cost > one then wait = 1e18 + two end
  end
  if wait > longest then refused, longest = i, wait end
end
local answer = {refused, string.format('%.17g', longest)}
for i = 1, #KEYS - 1 do
  local key, at = KEYS[i + 1], 4 * i
  local kind, one, two, cost = ask[at + 1], ask[at + 2], ask[at + 3], ask[at + 4]
  if refused > 0 then cost = 0 end
  if kind == 1 then
    local empty = values[i] + cost * one
    if refused == 0 and empty > now then
      redis.call('SET', key, string.format('%.17g', empty), 'PX', math.ceil((empty - now) / 1000) + 1000)
    end
    answer[2 * i + 1] = math.floor((two - (empty - now)) / one)
    answer[2 * i + 2] = math.ceil(empty - now)
  elseif kind == 2 then
    local held = values[i]
    if refused == 0 then
      redis.call('ZADD', key, now + ask[3], ask[2])
      redis.call('PEXPIRE', key, math.ceil(ask[3] / 1000) + 1000)
      held = held + 1
    end
    answer[2 * i + 1] = one - held
    answer[2 * i + 2] = 0
  else
    if refused == 0 then
      redis.call('INCRBYFLOAT', key, string.format('%.17g', cost))
      redis.call('EXPIRE', key, math.ceil(two) + 86400)
    end
    answer[2 * i + 1] = math.floor(one - values[i] - cost)
    answer[2 * i + 2] = math.ceil(two * 1000000)
  end
end
if refused == 0 and ask[4] ~= '' then redis.call('HINCRBY', KEYS[1], ask[4], 1) end
return answer
