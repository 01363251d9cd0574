// What OpenAI's client for Node.js reads, as JSON: node_client.mjs completes|chats MODEL
import { createRequire } from 'node:module';
import { join } from 'node:path';

const require = createRequire(join(process.env.CLIENT, 'package.json'));
const OpenAI = require('openai');
const api = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: 'none', maxRetries: 0 });
const [what, model] = process.argv.slice(2);

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    return [error.constructor.name, error.status, error.param];
  }
}

async function completes() {
  const asked = { model, prompt: 'import ', max_tokens: 60, seed: 7 };
  const whole = await api.completions.create({ ...asked, logprobs: 2 });
  let streamed = '';
  let usage = null;
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const part of await api.completions.create({ ...asked, ...options })) {
    streamed += part.choices[0]?.text ?? '';
    usage = part.usage ?? usage;
  }
  return {
    models: (await api.models.list()).data.map((each) => each.id),
    whole: whole.choices[0].text,
    logprobs: whole.choices[0].logprobs.token_logprobs.length,
    streamed,
    usage,
    refused: await refusal(() => api.completions.create({ ...asked, temperature: -1 })),
    missing: await refusal(() => api.completions.create({ ...asked, model: 'x' })),
  };
}

async function chats() {
  const messages = [{ role: 'user', content: 'Hello' }];
  const asked = { model, messages, max_completion_tokens: 20, seed: 3 };
  const whole = await api.chat.completions.create(asked);
  const running = api.chat.completions.stream(asked); // its helper puts the deltas together
  let heard = '';
  running.on('content', (delta) => (heard += delta));
  const final = await running.finalChatCompletion();
  const properties = { quick: { type: 'boolean' } };
  const schema = { type: 'object', properties, required: ['quick'], additionalProperties: false };
  const parsed = await api.chat.completions.parse({
    ...asked,
    max_completion_tokens: 400,
    response_format: { type: 'json_schema', json_schema: { name: 'animal', strict: true, schema } },
  });
  return {
    parsed: JSON.parse(parsed.choices[0].message.content),
    whole: whole.choices[0].message.content,
    usage: whole.usage,
    final: final.choices[0].message.content,
    heard,
  };
}

console.log(JSON.stringify(await { completes, chats }[what]()));
