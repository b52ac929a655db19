-- A gateway lives: its place among the gateways, what it has open, and every lease it holds, all as it says.
-- KEYS: 1 the gateways, 2 its open requests, then one a limit with slots. ARGV[1], msgpack: its id, lease length in microseconds,
-- {field, count ...} open, then for each limit the lease ids it holds. Answer: how many gateways live, then those that have died.
local told = cmsgpack.unpack(ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
redis.call('ZADD', KEYS[1], now + told[2], told[1])
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], '', 0) -- so that there is something to expire before the first request is counted in it
for at = 1, #told[3], 2 do redis.call('HSET', KEYS[2], told[3][at], told[3][at + 1]) end
redis.call('EXPIRE', KEYS[2], 86400)
for i = 3, #KEYS do
  for _, id in ipairs(told[i + 1]) do redis.call('ZADD', KEYS[i], now + told[2], id) end
  redis.call('PEXPIRE', KEYS[i], math.ceil(told[2] / 1000) + 1000)
end
local answer = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)
table.insert(answer, 1, redis.call('ZCOUNT', KEYS[1], '(' .. now, '+inf'))
return answer
