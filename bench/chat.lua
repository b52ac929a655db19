-- wrk script: one chat completion. STREAM=1 streams it, PACED=1 token by token; SENTENCES is the prompt's length in sentences of 27 bytes.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer sk-bench"
local stream = os.getenv("STREAM") == "1" and ',"stream":true' or ''
local paced = os.getenv("PACED") == "1" and 'paced ' or ''
local prompt = paced .. string.rep("Explain quantum computing. ", tonumber(os.getenv("SENTENCES") or "20"))
wrk.body = '{"model":"deepseek-v3","messages":[{"role":"user","content":"' .. prompt .. '"}],"max_tokens":64' .. stream .. '}'
