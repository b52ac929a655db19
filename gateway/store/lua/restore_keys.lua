-- Stored keys that were lost are put back, or given up. KEYS: 1 the keys, 2 their version, 3 which restoration was the last. ARGV[1], msgpack:
-- the version and the restoration that this was decided on, the version that there is at least from now on, a name for this restoration,
-- {name ...} to drop, {name, content ...} to put. Answer: 1, or 0 where something has changed meanwhile.
local given = cmsgpack.unpack(ARGV[1])
local version, restored = redis.call('GET', KEYS[2]) or '0', redis.call('GET', KEYS[3]) or ''
if version ~= given[1] or restored ~= given[2] then return 0 end
for _, name in ipairs(given[5]) do redis.call('HDEL', KEYS[1], name) end
for at = 1, #given[6], 2 do redis.call('HSET', KEYS[1], given[6][at], given[6][at + 1]) end
redis.call('SET', KEYS[2], string.format('%.0f', math.max(tonumber(version) + 1, given[3])))
redis.call('SET', KEYS[3], given[4])
return 1
