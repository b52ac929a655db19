-- The stored keys, if they have changed. KEYS: 1 the keys, 2 their version, 3 nothing, ever. ARGV: the version that is known.
-- Answer: the version, and where it is another one names and contents in turn. Both at one moment: never a list under a version that it is not.
-- A master that was demoted would go on answering; that it may not delete nothing tells what it is.
local probe = redis.pcall('DEL', KEYS[3])
if type(probe) == 'table' and string.find(probe.err, 'READONLY', 1, true) then return probe end
local version = redis.call('GET', KEYS[2]) or '0'
if version == ARGV[1] then return {version} end
return {version, redis.call('HGETALL', KEYS[1])}
