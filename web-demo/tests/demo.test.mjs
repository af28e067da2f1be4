// The demo as a visitor meets it: real browser, real server, real model.

import assert from "node:assert/strict";
import { mkdirSync } from "node:fs";
import { after, before, test } from "node:test";
import { launch, native, open, serve, site, target } from "./browser.mjs";

const PROMPT = "Once upon a time";
const TOKENS = 24;
const pictures = `${target}/web-pictures`;

/** @type {Awaited<ReturnType<typeof serve>>} */
let server;
/** @type {import("playwright-core").Browser} */
let browser;

before(async () => {
  mkdirSync(pictures, { recursive: true });
  server = await serve();
  browser = await launch();
});
after(async () => {
  await browser?.close();
  server?.stop();
});

/** @param {import("playwright-core").Page} page */
async function loaded(page) {
  await page.waitForFunction(() => {
    const problem = document.getElementById("problem");
    if (problem && !problem.hidden) throw new Error(problem.textContent ?? "");
    return document.getElementById("status")?.textContent === "The model is loaded.";
  });
}

/**
 * A message sent and answered.
 * @param {import("playwright-core").Page} page
 * @param {string} text
 */
async function ask(page, text) {
  await page.fill("#prompt", text);
  await page.click("#send");
  await page.waitForFunction(() => document.getElementById("speed")?.textContent);
}

/**
 * Sets the length of answers.
 * @param {import("playwright-core").Page} page
 * @param {number} tokens
 */
async function limit(page, tokens) {
  await page.evaluate(() => document.querySelector("#chat details")?.setAttribute("open", ""));
  await page.fill("#max_tokens", String(tokens));
}

/** Greedy tokens and text through the package. @param {import("playwright-core").Page} page */
function greedy(page) {
  return page.evaluate(
    async ({ prompt, max_tokens }) => {
      const { createEngine } = await import("/moewe/index.js");
      /** @type {string[]} */
      const phases = [];
      const engine = await createEngine("/models/gull-20m", {
        onProgress: ({ phase, progress }) => {
          if (!(progress >= 0 && progress <= 1)) throw new Error(`progress is ${progress}`);
          if (phases.at(-1) !== phase) phases.push(phase);
        },
      });
      const body = { prompt, max_tokens, temperature: 0 };
      const chunks = await engine.completions.create({ ...body, stream: true, stream_options: { include_usage: true } });
      let [text, usage, experts] = ["", undefined, []];
      for await (const chunk of chunks) {
        text += chunk.choices[0]?.text ?? "";
        if (chunk.moewe?.token !== null && chunk.moewe) experts.push(chunk.moewe.experts);
        usage ??= chunk.usage;
      }
      const whole = await engine.completions.create(body);
      const { info } = engine;
      engine.terminate();
      return { text, usage, experts, whole, info, phases };
    },
    { prompt: PROMPT, max_tokens: TOKENS },
  );
}

test("the browser writes what the native engine writes", async () => {
  const { context, page, errors } = await open(browser);
  await page.goto(server.url);
  const { text, usage, experts, whole, info, phases } = await greedy(page);
  const model = ["--model", `${site}/models/gull-20m`];
  const said = native(["run", PROMPT, "--raw", "-n", `${TOKENS}`, "--temperature", "0", ...model]);
  assert.equal(said.trim(), (said.startsWith(PROMPT) ? PROMPT + text : text).trim());
  assert.equal(whole.choices[0].text, text);
  assert.equal(usage.completion_tokens, experts.length);
  assert.ok(usage.completion_tokens > 4 && usage.extra.decode_tokens_per_s > 0);
  const slots = info.moe_layers.reduce((sum, { top_k }) => sum + top_k, 0);
  for (const chosen of experts) {
    assert.equal(chosen.length, slots);
    assert.ok(chosen.every((id) => id < info.moe_layers[0].experts));
  }
  assert.deepEqual(phases, ["fetch", "upload", "compile"]);
  assert.deepEqual(errors, []);
  await context.close();
});

test("a visitor loads, chats, sees experts, stops, and comes back offline", async () => {
  const { context, page, errors } = await open(browser, { colorScheme: "light", viewport: { width: 1280, height: 800 } });
  await page.goto(server.url);
  await page.click("#load");
  await loaded(page);
  assert.match(await page.textContent("#facts"), /webgpu/);
  const before = await page.locator("#heat").screenshot();
  await limit(page, 32);
  await ask(page, "Tell me a story about a gull.");
  assert.match(await page.textContent("#speed"), /tokens\/s/);
  const answer = page.locator("#messages .assistant");
  assert.ok((await answer.textContent()).length > 20);
  assert.notDeepEqual(await page.locator("#heat").screenshot(), before, "the heat map draws");

  await answer.locator(".token").nth(3).hover();
  assert.match(await page.textContent("#chosen"), /was written by layer \d+: \d+/);
  await page.screenshot({ path: `${pictures}/light.png` });
  await page.mouse.move(0, 0);
  await answer.focus();
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  const word = await answer.locator(".token").nth(1).textContent();
  assert.ok((await page.textContent("#chosen")).startsWith(`“${word}” was written`));
  await page.keyboard.press("Escape");
  assert.equal(await page.textContent("#chosen"), "");

  await limit(page, 1500);
  await page.fill("#prompt", "Tell me a very long story.");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll("#messages .assistant:last-child .token").length > 3);
  await page.click("#stop");
  await page.waitForFunction(() => !(/** @type {any} */ (document.getElementById("send")).disabled));
  const count = await page.locator("#messages .assistant:last-child .token").count();
  assert.ok(count < 1400, `${count} tokens came after all`);

  await page.emulateMedia({ colorScheme: "dark" });
  await page.screenshot({ path: `${pictures}/dark.png` });
  await page.setViewportSize({ width: 390, height: 844 });
  await page.screenshot({ path: `${pictures}/phone.png`, fullPage: true });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
  assert.ok(!wide, "the page fits a phone");

  await page.evaluate(() => navigator.serviceWorker.ready);
  await context.setOffline(true);
  await page.reload();
  await page.click("#load");
  await loaded(page);
  await limit(page, 4);
  await ask(page, "Hello!");
  await context.setOffline(false);
  // Offline, the browser itself reports what it could not fetch.
  assert.deepEqual(errors.filter((text) => !text.includes("ERR_INTERNET_DISCONNECTED")), []);
  await context.close();
});

test("a connection that breaks is taken up again", async () => {
  const { context, page } = await open(browser);
  /** @type {(string | undefined)[]} */
  const ranges = [];
  await context.route("**/model.safetensors", async (route) => {
    const range = route.request().headers().range;
    ranges.push(range);
    const response = await route.fetch();
    const body = await response.body();
    const headers = response.headers();
    delete headers["content-length"];
    // The first answer ends in the middle.
    await route.fulfill({ response, headers, body: ranges.length === 1 ? body.subarray(0, 5_000_000) : body });
  });
  await page.goto(server.url);
  await page.click("#load");
  await loaded(page);
  assert.deepEqual(ranges, [undefined, "bytes=5000000-"]);
  await context.close();
});

test("a damaged download is named, removed, and good the next time", async () => {
  const { context, page } = await open(browser);
  let spoil = true;
  await context.route("**/model.safetensors", async (route) => {
    const response = await route.fetch();
    const body = await response.body();
    if (spoil) body[body.length - 1000] ^= 1;
    await route.fulfill({ response, body });
  });
  await page.goto(server.url);
  await page.click("#load");
  await page.waitForSelector("#problem:not([hidden])");
  assert.match(await page.textContent("#problem-text"), /IntegrityError: model\.safetensors was damaged.*try again/);
  spoil = false;
  await page.click("#again");
  await loaded(page);
  await context.close();
});

test("a model that is not there, or is none, is named", async () => {
  const { context, page } = await open(browser);
  await page.goto(`${server.url}?model=models/nothing&load`);
  await page.waitForSelector("#problem:not([hidden])");
  assert.match(await page.textContent("#problem-text"), /DownloadError: .*models\/nothing\/.* 404.*address/);
  await context.route("**/config.json", (route) => route.fulfill({ body: '{"model_type":"unheard"}' }));
  await context.route("**/manifest.json", (route) => route.fulfill({ status: 404 }));
  await page.fill("#model", "models/gull-20m");
  await page.click("#load");
  await page.waitForFunction(() => document.getElementById("problem-text")?.textContent?.includes("unheard"));
  assert.match(await page.textContent("#problem-text"), /ModelError: .*not supported/);
  await context.close();
});

test("without WebGPU the page says what to do", async () => {
  const { context, page, errors } = await open(browser);
  await page.addInitScript(() => Object.defineProperty(navigator, "gpu", { value: undefined }));
  await page.goto(server.url);
  await page.waitForSelector("#problem:not([hidden])");
  assert.match(await page.textContent("#problem-text"), /WebGPUNotAvailableError: .*recent Chrome/);
  assert.ok(await page.isDisabled("#send"));
  assert.deepEqual(errors, []);
  await context.close();
});

test("a lost device is named and one click brings it back", async () => {
  const { context, page } = await open(browser);
  page.on("worker", (worker) =>
    worker
      .evaluate(() => {
        const scope = /** @type {any} */ (globalThis);
        const { requestDevice } = scope.GPUAdapter.prototype;
        scope.GPUAdapter.prototype.requestDevice = async function (/** @type {any} */ ...args) {
          scope.device = await requestDevice.apply(this, args);
          return scope.device;
        };
      })
      .catch(() => {}),
  );
  await page.goto(server.url);
  await page.click("#load");
  await loaded(page);
  await limit(page, 500);
  await page.fill("#prompt", "Tell me a long story.");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll(".token").length > 2);
  await page.workers()[0].evaluate(() => /** @type {any} */ (globalThis).device.destroy());
  await page.waitForSelector("#problem:not([hidden])");
  assert.match(await page.textContent("#problem-text"), /DeviceLostError/);
  await page.click("#again");
  await loaded(page);
  await limit(page, 4);
  await ask(page, "Hello!");
  await context.close();
});

test("requests that cannot be served are refused, others go on together", async () => {
  const { context, page, errors } = await open(browser);
  await page.goto(server.url);
  const result = await page.evaluate(async () => {
    const { createEngine } = await import("/moewe/index.js");
    const engine = await createEngine("/models/gull-20m");
    const refused = async (/** @type {any} */ body) => {
      const error = await engine.chat.completions.create(body).catch((/** @type {Error} */ e) => e);
      return `${error.name}: ${error.message}`;
    };
    const messages = [{ role: "user", content: "Hello!" }];
    const greedy = { messages, temperature: 0, max_tokens: 12 };
    const errors = [
      await refused({ messages, n: 2 }),
      await refused({ messages, tools: [{}] }),
      await refused({ messages, temperature: -1 }),
      await refused({}),
    ];
    const alone = await engine.chat.completions.create(greedy);
    const together = await Promise.all([1, 2, 3].map(() => engine.chat.completions.create(greedy)));
    const stopped = await engine.chat.completions.create({ ...greedy, stop: alone.choices[0].message.content.slice(4, 7) });
    await engine.unload();
    errors.push(await refused(greedy));
    return { errors, alone, together, stopped };
  });
  const [n, tools, temperature, none, unloaded] = result.errors;
  assert.match(n, /RequestError: n must be 1/);
  assert.match(tools, /RequestError: tools/);
  assert.match(temperature, /RequestError: .*temperature/);
  assert.match(none, /RequestError: give either messages or prompt/);
  assert.match(unloaded, /ModelNotLoadedError: .*reload/);
  const text = result.alone.choices[0].message.content;
  for (const answer of result.together) assert.equal(answer.choices[0].message.content, text);
  assert.equal(result.stopped.choices[0].finish_reason, "stop");
  assert.ok(text.startsWith(result.stopped.choices[0].message.content));
  assert.deepEqual(errors, []);
  await context.close();
});
