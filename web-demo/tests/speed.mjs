// Decode speed in the browser beside the native engine's, both on the CPU, in one run:
// node speed.mjs (after ./x web). Prints a line of JSON.

import { execFileSync } from "node:child_process";
import { launch, open, serve, site, target } from "./browser.mjs";

const [prompt, tokens] = ["Once upon a time", 128];
const server = await serve();
const browser = await launch();
const { page } = await open(browser);
await page.goto(server.url);
const inBrowser = await page.evaluate(
  async ({ prompt, tokens }) => {
    const { createEngine } = await import("/moewe/index.js");
    const engine = await createEngine("/models/gull-20m");
    const rates = [];
    for (let run = 0; run < 3; run += 1) {
      const body = { prompt, max_tokens: tokens, temperature: 0, ignore_eos: true };
      rates.push((await engine.completions.create(body)).usage.extra.decode_tokens_per_s);
    }
    return { adapter: engine.info.adapter, rate: Math.max(...rates) };
  },
  { prompt, tokens },
);
await browser.close();
server.stop();

const program = process.env.MOEWE ?? `${target}/release/moewe`;
const args = ["bench", "--model", `${site}/models/gull-20m`, "-p", "16", "-n", `${tokens}`, "-b", "1", "-r", "3", "-o", "json"];
const bench = JSON.parse(execFileSync(program, args, { encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] }));
const row = bench.rows.find(({ n_gen }) => n_gen > 0);
const native = { adapter: bench.device, rate: Math.max(...row.samples_ts) };
console.log(JSON.stringify({ browser: inBrowser, native, ratio: inBrowser.rate / native.rate }));
