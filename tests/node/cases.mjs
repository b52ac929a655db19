// Runs cases read from standard input through openai-node and prints what became of each, in the same words as tests/wire/test_sdks.py.
import OpenAI from 'openai';
import { readFileSync } from 'node:fs';

const { baseURL, cases } = JSON.parse(readFileSync(0, 'utf8'));

async function run({ body, key = 'foo', retries = 0, timeout_s = 30, helper = '' }) {
  const client = new OpenAI({ baseURL, apiKey: key, maxRetries: retries, timeout: timeout_s * 1000 });
  const found = { chunks: 0, text: '', tools: '', finish: null, tokens: null };
  try {
    if (helper === 'embeddings') {
      await client.embeddings.create(body);
    } else if (helper === 'parse') {
      found.text = JSON.stringify((await client.chat.completions.parse(body)).choices[0].message.parsed ?? null);
    } else if (helper === 'raw') {
      const { data, response, request_id } = await client.chat.completions.create(body).withResponse();
      found.text = data.choices[0].message.content;
      found.headers = request_id === response.headers.get('x-request-id') && response.headers.has('openai-processing-ms');
    } else if (body.stream) {
      for await (const chunk of await client.chat.completions.create(body)) {
        const choice = chunk.choices[0];
        found.chunks += 1;
        found.text += choice?.delta?.content ?? '';
        for (const call of choice?.delta?.tool_calls ?? []) found.tools += (call.function?.name ?? '') + (call.function?.arguments ?? '');
        found.finish = choice?.finish_reason ?? found.finish;
        found.tokens = chunk.usage?.completion_tokens ?? found.tokens;
      }
    } else {
      const answer = await client.chat.completions.create(body);
      found.text = answer.choices[0].message.content;
      found.finish = answer.choices[0].finish_reason;
      found.tokens = answer.usage.completion_tokens;
    }
  } catch (error) {
    const { constructor, status = null, code = null, param = null, requestID, message } = error;
    found.error = { name: constructor.name, status, code, param, traced: Boolean(requestID) || /req_[0-9a-f]{32}/.test(message) };
  }
  return found;
}

console.log(JSON.stringify(await Promise.all(cases.map(run))));
