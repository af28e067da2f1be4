// The dashboard of a running server in headless Chromium, at desktop and phone width, light and
// dark. Usage: node dashboard.mjs BASE_URL KEY [FOLDER for screenshots]

import assert from "node:assert/strict";
import { accessSync } from "node:fs";
import { chromium } from "playwright-core";

const [baseUrl, key, folder] = process.argv.slice(2);
const names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
const paths = [process.env.CHROMIUM, ...names.map(name => `/usr/bin/${name}`)];
const executablePath = paths.find(path => {
  try { accessSync(path); return true; } catch { return false; }
});
assert.ok(executablePath, "no Chromium; install it, or set CHROMIUM to its path");
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });

/** Opens the dashboard; whatever the browser complains of later fails the check. */
async function open(options) {
  const page = await browser.newPage(options);
  const complaints = [];
  page.on("console", message => {
    if (["error", "warning"].includes(message.type())) complaints.push(message.text());
  });
  page.on("pageerror", error => complaints.push(String(error)));
  page.on("requestfailed", request => {
    // Stopping an answer ends its request.
    if (!request.url().endsWith("/v1/chat/completions")) complaints.push(request.url());
  });
  await page.goto(baseUrl);
  return { page, complaints };
}

const status = page => page.locator("#status");
const has = (locator, text) => locator.filter({ hasText: text }).waitFor({ timeout: 60_000 });
const shoot = async (page, name) => {
  if (folder) await page.screenshot({ path: `${folder}/${name}.png`, fullPage: true });
};

async function giveKey(page) {
  await has(status(page), "key");
  await page.fill("#key", key);
  await page.press("#key", "Enter");
  await has(status(page), "connected");
}

async function ask(page, text) {
  await page.fill("#prompt", text);
  await page.press("#prompt", "Enter");
}

/** Different colours of a canvas. */
const colours = (page, canvas) => page.evaluate(id => {
  const canvas = document.getElementById(id);
  const { width, height } = canvas;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  const all = new Set();
  for (let i = 0; i < data.length; i += 4) all.add(data.slice(i, i + 4).join());
  return { width, height, n: all.size };
}, canvas);

async function desktop(colorScheme) {
  const viewport = { width: 1280, height: 800 };
  const { page, complaints } = await open({ viewport, colorScheme });
  // The first polls have no key, which the browser logs.
  await giveKey(page);
  complaints.length = 0;
  await has(page.locator("#model"), "context");
  await page.fill("#max", "40");
  await ask(page, "Tell me a story.");
  await has(page.locator("#speed"), /[0-9]+ tokens, first after [0-9]+ ms/);
  const said = await page.locator("#log p").allTextContents();
  assert.equal(said.length, 2);
  assert.ok(said[1].length > 20, said[1]);
  await has(page.locator("#top"), "%");
  // Layers of the model by experts, told apart by colour once tokens were routed.
  await page.waitForTimeout(1500);
  const heat = await colours(page, "heat");
  assert.ok(heat.width > 1 && heat.height > 1 && heat.n > 4, JSON.stringify(heat));
  await page.hover("#heat");
  await has(page.locator("#hover"), /layer [0-9]+, expert [0-9]+: /);
  await shoot(page, `desktop-${colorScheme}`);
  // Escape stops an answer, and the conversation goes on.
  await page.fill("#max", "800");
  await ask(page, "Tell me a long story.");
  await page.waitForFunction(() => document.querySelectorAll("#log p").length === 4
    && document.querySelector("#log p:last-child span").textContent.length > 10);
  await page.keyboard.press("Escape");
  await page.locator("#send:enabled").waitFor();
  await has(page.locator("#running"), /^0$/);
  await page.fill("#max", "8");
  await ask(page, "Hello!");
  await page.waitForFunction(() => document.querySelectorAll("#log p").length === 6);
  await page.locator("#send:enabled").waitFor();
  // What the server refuses is told in its words.
  await page.fill("#max", "100000");
  await ask(page, "Hello!");
  await has(page.locator("#log .error"), "max_tokens");
  complaints.splice(0, complaints.length, ...complaints.filter(text => !text.includes("400")));
  await page.click("#clear");
  assert.equal(await page.locator("#log p").count(), 0);
  assert.deepEqual(complaints, []);
  await page.close();
}

async function phone() {
  const viewport = { width: 360, height: 740 };
  const { page, complaints } = await open({ viewport, colorScheme: "dark", hasTouch: true });
  await giveKey(page);
  complaints.length = 0;
  await ask(page, "Why is the sky blue?");
  await has(page.locator("#speed"), /tokens/);
  await page.waitForTimeout(1500);
  await shoot(page, "phone");
  const { wide, high } = await page.evaluate(() => ({
    wide: document.scrollingElement.scrollWidth, high: document.scrollingElement.scrollHeight,
  }));
  assert.ok(wide <= viewport.width && high > viewport.height, `${wide} x ${high}`);
  assert.deepEqual(complaints, []);
  await page.close();
}

let failed = 0;
for (const [name, check] of [
  ["light", () => desktop("light")], ["dark", () => desktop("dark")], ["phone", phone],
]) {
  let verdict = "ok";
  try {
    await check();
  } catch (error) {
    failed += 1;
    verdict = `FAILED: ${error.stack}`;
  }
  console.log(`dashboard ${name}: ${verdict}`);
}
await browser.close();
process.exit(failed > 0 ? 1 : 0);
