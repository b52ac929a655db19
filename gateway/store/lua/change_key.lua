-- A stored key is made, changed or dropped, and everybody can see that something has. KEYS: 1 the keys, 2 their version.
-- ARGV: create | put | drop, name, content. Answer: 1 if it was done, 0 where create found one, and put or drop none.
local there = redis.call('HEXISTS', KEYS[1], ARGV[2])
if (ARGV[1] == 'create') == (there == 1) then return 0 end
if ARGV[1] == 'drop' then redis.call('HDEL', KEYS[1], ARGV[2]) else redis.call('HSET', KEYS[1], ARGV[2], ARGV[3]) end
redis.call('INCR', KEYS[2])
return 1
