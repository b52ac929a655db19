-- Who tells of a used budget. KEYS: 1 what is to be told. ARGV: 1 who asks, 2 for how long (ms) nobody else will be told to.
-- Answer: 'ours', 'told' where that was done, or 'others' where somebody is at it.
local now = redis.call('GET', KEYS[1])
if now == 'told' then return now end
if now and now ~= ARGV[1] then return 'others' end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 'ours'
