// openai-node against the gateway: JSON, stream, helper, error. Prints one JSON object that the Python test checks.
import OpenAI from 'openai';

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: 'none', maxRetries: 0 });
const model = 'deepseek-v3-tiny';
const messages = [{ role: 'user', content: 'Hello' }];

const whole = await client.chat.completions.create({ model, messages, max_tokens: 8 });

const stream = await client.chat.completions.create({ model, messages, max_tokens: 8, stream: true, stream_options: { include_usage: true } });
let text = '', chunks = 0, usage = null, finish = null;
for await (const chunk of stream) {
  chunks += 1;
  text += chunk.choices[0]?.delta?.content ?? '';
  finish = chunk.choices[0]?.finish_reason ?? finish;
  usage = chunk.usage ?? usage;
}

const runner = client.chat.completions.stream({ model, messages, max_tokens: 8 });
const final = await runner.finalChatCompletion();

let error = null;
try {
  await client.chat.completions.create({ model: 'nope', messages });
} catch (thrown) {
  error = { name: thrown.constructor.name, status: thrown.status, code: thrown.code, requestID: thrown.requestID };
}
const listed = (await client.models.list()).data.map((entry) => entry.id);

console.log(JSON.stringify({
  whole: { id: whole.id, tokens: whole.usage.completion_tokens, requestID: whole._request_id },
  stream: { chunks, text, usage, finish },
  helper: final.choices[0].finish_reason,
  error,
  listed,
}));
