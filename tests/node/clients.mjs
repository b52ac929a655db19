// The JavaScript clients, as tests/clients has those in Python: a Site as JSON on standard input, what became of each deed as JSON.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, isStepCount, jsonSchema, Output, streamText, tool } from 'ai';
import OpenAI from 'openai';
import { readFileSync } from 'node:fs';

const { root, key } = JSON.parse(readFileSync(0, 'utf8'));
const baseURL = `${root}/v1`;
const WEATHER = 'What is the weather like?', PLAYED = '[[golden sglang-0.5.23-chat-stream-full]]', BREAKS = '[[die 3]]';
const SCHEMA = {
  type: 'object', properties: { city: { type: 'string', enum: ['Paris', 'Rome'] } }, required: ['city'], additionalProperties: false,
};

async function raised(library, work) {
  try {
    return `nothing, but ${JSON.stringify(await work())}`;
  } catch (error) {
    const status = error.status ?? error.statusCode;
    return `${library}.${error.name === 'Error' ? error.constructor.name : error.name.replace('AI_', '')}${status ? ` ${status}` : ''}`;
  }
}

async function gathered(pieces, text) {
  const found = [];
  for await (const piece of pieces) found.push(text(piece));
  return found;
}

function openai() {
  const { chat, responses } = new OpenAI({ baseURL, apiKey: key });
  const tools = [{ type: 'function', function: { name: 'get_weather', parameters: SCHEMA } }];
  const request = (content = WEATHER, model = 'tiny') => ({ model, messages: [{ role: 'user', content }] });
  const ask = (more, ...which) => chat.completions.create({ ...request(...which), ...more });
  const text = (chunk) => chunk.choices[0]?.delta.content ?? '';
  return {
    plain: async () => (await ask({})).choices[0].message.content,
    stream: async () => gathered(await ask({ stream: true }), text),
    tool: async () => {
      const call = (await ask({ tools, tool_choice: 'required' })).choices[0].message.tool_calls[0].function;
      return [call.name, call.arguments];
    },
    played: async () => {
      const { message } = (await chat.completions.stream({ ...request(PLAYED, 'played'), tools }).finalChatCompletion()).choices[0];
      return [message.content, message.tool_calls[0].function.name, message.tool_calls[0].function.arguments];
    },
    structured: async () => {
      const response_format = { type: 'json_schema', json_schema: { name: 'where', schema: SCHEMA, strict: true } };
      return JSON.parse((await ask({ response_format })).choices[0].message.content);
    },
    responses: async () => (await responses.create({ model: 'tiny', input: WEATHER })).output_text,
    refused: () => raised('openai', () => ask({}, WEATHER, 'nobodys')),
    broken: () => raised('openai', async () => gathered(await ask({ stream: true }, BREAKS, 'played'), text)),
  };
}

function vercel() {
  const penstock = createOpenAICompatible({ name: 'penstock', baseURL, apiKey: key, supportsStructuredOutputs: true });
  const request = (prompt = WEATHER, model = 'tiny') => ({ model: penstock(model), prompt });
  const get_weather = tool({ description: 'The weather.', inputSchema: jsonSchema(SCHEMA), execute: async ({ city }) => `fine in ${city}` });
  const quiet = { onError: () => {} };
  return {
    plain: async () => (await generateText(request())).text,
    stream: async () => gathered(streamText({ ...request(), ...quiet }).textStream, (piece) => piece),
    tool: async () => {
      const { toolCalls } = await generateText({ ...request(), tools: { get_weather }, toolChoice: 'required' });
      return [toolCalls[0].toolName, toolCalls[0].input];
    },
    played: async () => {
      const said = streamText({ ...request(PLAYED, 'played'), tools: { get_weather }, ...quiet });
      const [call] = await said.toolCalls;
      return [await said.text, call.toolName, call.input, await said.reasoningText];
    },
    loop: async () => {
      const said = streamText({ ...request(PLAYED, 'played'), tools: { get_weather }, stopWhen: isStepCount(3), ...quiet });
      return said.text;
    },
    structured: async () => (await generateText({ ...request(), output: Output.object({ schema: jsonSchema(SCHEMA) }) })).output,
    refused: () => raised('ai', () => generateText(request(WEATHER, 'nobodys'))),
    broken: () => raised('ai', () => gathered(streamText({ ...request(BREAKS, 'played'), ...quiet }).fullStream, (part) => {
      if (part.type === 'error') throw part.error;
    })),
  };
}

async function version(name) {
  return JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url))).version;
}

const clients = {
  'openai-node': [openai(), ['openai'], 'new OpenAI({baseURL: "http://HOST/v1"})'],
  'Vercel AI SDK': [vercel(), ['ai', '@ai-sdk/openai-compatible'], 'createOpenAICompatible({baseURL: "http://HOST/v1"})'],
};
const told = {};
for (const [name, [deeds, packages, base_url]] of Object.entries(clients)) {
  const found = {};
  for (const [deed, work] of Object.entries(deeds)) {
    try {
      found[deed] = await work();
    } catch (error) {
      found[deed] = { failed: `${error.stack} ${error.cause?.stack ?? ''}`.slice(0, 2500) };
    }
  }
  const versions = Object.fromEntries(await Promise.all(packages.map(async (one) => [one, await version(one)])));
  told[name] = { versions, base_url, found };
}
console.log(JSON.stringify(told));
