// The official JavaScript client against a running server: `./x clients` starts one and calls
// this. Usage: node conformance.mjs BASE_URL KEY

import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseUrl, apiKey] = process.argv.slice(2);
const connection = { baseURL: `${baseUrl}/v1`, apiKey, maxRetries: 0, timeout: 120_000 };
const client = new OpenAI(connection);
const model = (await client.models.list()).data[0].id;
const hello = [{ role: "user", content: "Hello!" }];
const story = [{ role: "user", content: "Tell me a story." }];
const schema = {
  type: "object",
  properties: { city: { type: "string", enum: ["Kiel", "Bonn"] } },
  required: ["city"],
  additionalProperties: false,
};
const weather = {
  type: "function",
  function: { name: "get_weather", description: "Weather of a city", parameters: schema },
};

const chat = (fields = {}, options = {}) => client.chat.completions.create(
  { model, messages: hello, temperature: 0, max_tokens: 24, ...fields }, options);
const text = answer => answer.choices[0].message.content;

async function all(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}
const joined = chunks => chunks.map(c => c.choices[0]?.delta.content ?? "").join("");

async function becomesIdle() {
  for (let i = 0; i < 100; i++) {
    const load = await fetch(`${baseUrl}/load`, { headers: { authorization: `Bearer ${apiKey}` } });
    if ((await load.json()).server_load === 0) return;
    await new Promise(done => setTimeout(done, 50));
  }
  assert.fail("requests stay open");
}

const checks = {
  async models() {
    assert.equal((await client.models.retrieve(model)).id, model);
  },

  async chat() {
    const { data: answer, response } = await chat().withResponse();
    assert.equal(answer.object, "chat.completion");
    assert.equal(answer.choices[0].message.role, "assistant");
    assert.ok(text(answer).length > 0);
    assert.equal(answer.choices[0].finish_reason, "stop");
    const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
    assert.ok(prompt_tokens > 0 && completion_tokens > 0);
    assert.equal(total_tokens, prompt_tokens + completion_tokens);
    assert.equal(answer._request_id, response.headers.get("x-request-id"));
  },

  async streaming() {
    const whole = await chat();
    const chunks = await all(await chat({ stream: true, stream_options: { include_usage: true } }));
    assert.equal(chunks[0].choices[0].delta.role, "assistant");
    assert.equal(joined(chunks), text(whole));
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.deepEqual(chunks.at(-1).usage, whole.usage);
    assert.equal(chunks.at(-2).choices[0].finish_reason, "stop");
    const helper = client.chat.completions.stream(
      { model, messages: hello, temperature: 0, max_tokens: 24 });
    assert.equal(await helper.finalContent(), text(whole));
  },

  async logprobs() {
    const answer = await chat({ logprobs: true, top_logprobs: 3, max_tokens: 4 });
    const tokens = answer.choices[0].logprobs.content;
    assert.equal(tokens.length, 4);
    for (const token of tokens) {
      assert.equal(token.top_logprobs.length, 3);
      assert.equal(token.top_logprobs[0].token, token.token);
      assert.ok(token.logprob <= 0);
    }
  },

  async n() {
    const fields = { messages: story, n: 3, temperature: 1, seed: 5 };
    const answer = await chat(fields);
    assert.deepEqual(answer.choices.map(c => c.index), [0, 1, 2]);
    assert.ok(new Set(answer.choices.map(c => c.message.content)).size > 1);
    const streamed = ["", "", ""];
    for (const chunk of await all(await chat({ ...fields, stream: true })))
      for (const choice of chunk.choices) streamed[choice.index] += choice.delta.content ?? "";
    assert.deepEqual(streamed, answer.choices.map(c => c.message.content));
  },

  async stop() {
    const whole = text(await chat({ messages: story, max_tokens: 60 }));
    const word = whole.split(" ")[4];
    const answer = await chat({ messages: story, max_tokens: 60, stop: [word] });
    assert.equal(text(answer), whole.slice(0, whole.indexOf(word)));
    assert.equal(answer.choices[0].finish_reason, "stop");
  },

  async seed() {
    const say = async seed => text(await chat({ messages: story, temperature: 1, seed }));
    assert.equal(await say(1), await say(1));
    const others = await Promise.all([1, 2, 3, 4].map(say));
    assert.ok(new Set(others).size > 1);
  },

  async tools() {
    const tool_choice = { type: "function", function: { name: "get_weather" } };
    const answer = await chat({ tools: [weather], tool_choice, max_tokens: 200 });
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
    const helper = client.chat.completions.stream(
      { model, messages: hello, temperature: 0, max_tokens: 200, tools: [weather], tool_choice });
    const streamed = (await helper.finalMessage()).tool_calls[0];
    assert.equal(streamed.function.arguments, call.function.arguments);
    // The client calls the function itself and tells the model the result.
    const asked = [];
    const runner = client.chat.completions.runTools({
      model, messages: hello, temperature: 0, max_tokens: 200, tool_choice,
      tools: [{ type: "function", function: {
        ...weather.function, parse: JSON.parse,
        function: ({ city }) => { asked.push(city); return "rain"; },
      } }],
    });
    await runner.done();
    assert.deepEqual(asked, [JSON.parse(call.function.arguments).city]);
  },

  async jsonSchema() {
    const response_format = { type: "json_schema", json_schema: { name: "w", schema, strict: true } };
    const answer = JSON.parse(text(await chat({ response_format, max_tokens: 100 })));
    assert.ok(["Kiel", "Bonn"].includes(answer.city));
  },

  async completions() {
    const fields = { model, prompt: "Once upon a time", temperature: 0, max_tokens: 12 };
    const answer = await client.completions.create(fields);
    const chunks = await all(await client.completions.create({ ...fields, stream: true }));
    assert.equal(chunks.map(c => c.choices[0].text).join(""), answer.choices[0].text);
  },

  async errors() {
    const wrong = new OpenAI({ ...connection, apiKey: "wrong" });
    await assert.rejects(wrong.models.list(), OpenAI.AuthenticationError);
    await assert.rejects(chat({ model: "no-such-model" }), OpenAI.NotFoundError);
    await assert.rejects(chat({ temperature: -1 }), error => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.param, "temperature");
      assert.equal(error.type, "BadRequestError");
      assert.ok(error.requestID && error.message.includes("temperature"));
      return true;
    });
  },

  async cancellation() {
    const fields = { messages: story, max_tokens: 900, ignore_eos: true };
    const stream = await chat({ ...fields, stream: true });
    let n = 0;
    for await (const _ of stream) if (++n === 3) break;
    await becomesIdle();
    const stopper = new AbortController();
    setTimeout(() => stopper.abort(), 200);
    await assert.rejects(chat(fields, { signal: stopper.signal }), OpenAI.APIUserAbortError);
    await becomesIdle();
    await assert.rejects(chat(fields, { timeout: 200 }), OpenAI.APIConnectionTimeoutError);
    await becomesIdle();
  },

  async concurrentStreams() {
    const fields = { messages: story, max_tokens: 8 };
    const alone = text(await chat(fields));
    const read = async () => joined(await all(await chat({ ...fields, stream: true })));
    const texts = await Promise.all(Array.from({ length: 64 }, read));
    assert.deepEqual(texts, Array(64).fill(alone));
    await becomesIdle();
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  const start = performance.now();
  let verdict = "ok";
  try {
    await check();
  } catch (error) {
    failed += 1;
    verdict = `FAILED: ${error.stack}`;
  }
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  console.log(`javascript ${name} ${seconds} s: ${verdict}`);
}
process.exit(failed > 0 ? 1 : 0);
