-- A gateway has died: what it had open is counted as lost, once. KEYS: 1 the gateways, 2 its open requests, 3 the day's ledger,
-- 4 the last batch of each gateway.
-- ARGV: its id, seconds the ledger is kept, what a field of the ledger ends with, by how much our time is ahead of the server's.
-- Answer: how many requests were lost.
local time = redis.call('TIME')
local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not score or tonumber(score) > time[1] * 1000000 + time[2] + ARGV[4] then return 0 end
local open = redis.call('HGETALL', KEYS[2])
local lost = 0
for at = 1, #open, 2 do
  if tonumber(open[at + 1]) > 0 then
    lost = lost + tonumber(open[at + 1])
    redis.call('HINCRBY', KEYS[3], open[at] .. ARGV[3], open[at + 1])
  end
end
if lost > 0 then redis.call('EXPIRE', KEYS[3], ARGV[2]) end
redis.call('DEL', KEYS[2])
redis.call('HDEL', KEYS[4], ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
return lost
