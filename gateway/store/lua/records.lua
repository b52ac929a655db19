-- What happened to requests, for whoever asks: the last so many of the deployment. KEYS: 1 records by id, 2 ids by time, 3 ids by the client's id.
-- ARGV[1], msgpack: how many are kept, then {id, the client's id, time, record} each.
local given = cmsgpack.unpack(ARGV[1])
for n = 2, #given do
  local one = given[n]
  redis.call('HSET', KEYS[1], one[1], one[4])
  redis.call('ZADD', KEYS[2], one[3], one[1])
  redis.call('HSET', KEYS[3], one[2], one[1])
end
local over = redis.call('ZCARD', KEYS[2]) - given[1]
if over > 0 then
  for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, over - 1)) do
    local record = redis.call('HGET', KEYS[1], id)
    local theirs = record and cjson.decode(record)['request_id']
    if theirs and redis.call('HGET', KEYS[3], theirs) == id then redis.call('HDEL', KEYS[3], theirs) end
    redis.call('HDEL', KEYS[1], id)
  end
  redis.call('ZREMRANGEBYRANK', KEYS[2], 0, over - 1)
end
for i = 1, 3 do redis.call('EXPIRE', KEYS[i], 86400) end
return 1
