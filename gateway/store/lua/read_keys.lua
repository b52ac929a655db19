-- The stored keys, if they have changed. KEYS: 1 the keys, 2 their version, 3 which restoration was the last, 4 nothing, ever.
-- ARGV: the version and the restoration that are known. Answer: version and restoration, and where they are others names and contents in turn.
-- All at one moment: never a list under a version that it is not.
-- A master that was demoted would go on answering; that it may not delete nothing tells what it is.
local probe = redis.pcall('DEL', KEYS[4])
if type(probe) == 'table' and string.find(probe.err, 'READONLY', 1, true) then return probe end
local version, restored = redis.call('GET', KEYS[2]) or '0', redis.call('GET', KEYS[3]) or ''
if version == ARGV[1] and restored == ARGV[2] then return {version, restored} end
return {version, restored, redis.call('HGETALL', KEYS[1])}
