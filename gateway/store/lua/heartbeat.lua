-- A gateway lives: how long it may be taken to, what it has open, and every lease it holds, all as it says.
-- KEYS: 1 the gateways, 2 its open requests, then one a limit with slots. ARGV[1], msgpack: its id, lease length in microseconds,
-- {field, count ...} open, then for each limit the lease ids it holds. Answer: how many gateways live, then those that have died.
local said = cmsgpack.unpack(ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
redis.call('ZADD', KEYS[1], now + said[2], said[1])
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], '', 0) -- so that there is something to expire before the first request is counted in it
for at = 1, #said[3], 2 do redis.call('HSET', KEYS[2], said[3][at], said[3][at + 1]) end
redis.call('EXPIRE', KEYS[2], 86400)
for i = 3, #KEYS do
  for _, id in ipairs(said[i + 1]) do redis.pcall('ZADD', KEYS[i], now + said[2], id) end
  redis.call('PEXPIRE', KEYS[i], math.ceil(said[2] / 1000) + 1000)
end
local answer = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)
table.insert(answer, 1, redis.call('ZCOUNT', KEYS[1], '(' .. now, '+inf'))
return answer
