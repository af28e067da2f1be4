// Starts the demo's own server and a browser whose WebGPU runs on the CPU, and watches the pages'
// consoles.

import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const root = fileURLToPath(new URL("../../", import.meta.url));
/** Where cargo puts things. */
export const target = process.env.CARGO_TARGET_DIR ?? `${root}target`;
export const site = `${target}/web`;

/** Options of a browser on a machine without GPU, without its own talk to the network. */
const ARGS = [
  "--no-sandbox",
  "--enable-unsafe-webgpu",
  "--use-webgpu-adapter=swiftshader",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

/** The server of `./x web --serve`, on a port of its choice. */
export async function serve() {
  const server = spawn(`${target}/web-build/debug/moewe-web-build`, ["serve", site, "0"], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const [url] = await once(createInterface(server.stdout), "line");
  return { url, stop: () => server.kill() };
}

export function launch() {
  const names = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
  const executablePath = process.env.CHROMIUM ?? names.find(existsSync);
  return chromium.launch({ executablePath, args: ARGS });
}

/**
 * A page in a context of its own; `errors` collects what its console complains of.
 * @param {import("playwright-core").Browser} browser
 * @param {import("playwright-core").BrowserContextOptions} [options]
 */
export async function open(browser, options) {
  const context = await browser.newContext(options);
  context.setDefaultTimeout(180_000);
  const page = await context.newPage();
  /** @type {string[]} */
  const errors = [];
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  page.on("pageerror", (error) => errors.push(String(error)));
  return { context, page, errors };
}

/**
 * What the native program says.
 * @param {string[]} args
 */
export function native(args) {
  const program = process.env.MOEWE ?? `${target}/debug/moewe`;
  return execFileSync(program, args, { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] });
}
