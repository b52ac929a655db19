-- Who has called. KEYS: 1 minutes of last calls by name, 2 who comes with tokens. ARGV[1], msgpack: whoever called last before this time is
-- forgotten, seconds to live, how many are kept, {name, minute, ...}, {name, what is known of it, ...}.
local asked = cmsgpack.unpack(ARGV[1])
for at = 1, #asked[4], 2 do redis.call('ZADD', KEYS[1], 'GT', asked[4][at + 1], asked[4][at]) end
for at = 1, #asked[5], 2 do redis.call('HSET', KEYS[2], asked[5][at], asked[5][at + 1]) end
local old = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', asked[1])
local over = redis.call('ZCARD', KEYS[1]) - #old - asked[3]
if over > 0 then
  for _, name in ipairs(redis.call('ZRANGE', KEYS[1], #old, #old + over - 1)) do old[#old + 1] = name end
end
for _, name in ipairs(old) do
  redis.call('ZREM', KEYS[1], name)
  redis.call('HDEL', KEYS[2], name)
end
redis.call('EXPIRE', KEYS[1], asked[2])
redis.call('EXPIRE', KEYS[2], asked[2])
return #old
