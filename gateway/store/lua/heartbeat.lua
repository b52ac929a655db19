-- A gateway lives: how long it may be taken to, what it has open, and every lease it holds, all as it says.
-- KEYS: 1 the gateways, 2 its open requests, 3 the clock, then one a limit with slots. ARGV[1], msgpack: its id, lease length in
-- microseconds, {field, count ...} open, then for each limit the lease ids it holds. Answer: by how much our time is ahead of the
-- server's, how many gateways live, then those that have died.
-- Our time never goes back: by as much as the server's clock was set back since the last heartbeat of anybody, ours is ahead of it.
local said = cmsgpack.unpack(ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local clock = redis.call('HMGET', KEYS[3], 'ahead', 'last')
local ahead, last = tonumber(clock[1]) or 0, tonumber(clock[2]) or 0
if now + ahead < last then ahead = last - now end
now = now + ahead
redis.call('HSET', KEYS[3], 'ahead', string.format('%.17g', ahead), 'last', string.format('%.17g', now))
redis.call('EXPIRE', KEYS[3], 86400)
redis.call('ZADD', KEYS[1], now + said[2], said[1])
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], '', 0) -- so that there is something to expire before the first request is counted in it
for at = 1, #said[3], 2 do redis.call('HSET', KEYS[2], said[3][at], said[3][at + 1]) end
redis.call('EXPIRE', KEYS[2], 86400)
for i = 4, #KEYS do
  for _, id in ipairs(said[i]) do redis.pcall('ZADD', KEYS[i], now + said[2], id) end
  redis.call('PEXPIRE', KEYS[i], math.ceil(said[2] / 1000) + 1000)
end
local answer = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.17g', now))
table.insert(answer, 1, redis.call('ZCOUNT', KEYS[1], '(' .. string.format('%.17g', now), '+inf'))
table.insert(answer, 1, string.format('%.17g', ahead))
return answer
