// The engine's thread: takes calls from the page, steps the engine while there are requests, and
// sends back what each step brought.

import init, { Hash, WebEngine } from "./wasm/moewe.js";
import { clear, download, isCached } from "./download.js";
import { named, pack } from "./errors.js";

/** @type {WebEngine | undefined} */
let engine;
let stepping = false;
/** Calls that wait for the step to end, since the engine does one thing at a time.
 * @type {(() => void)[]} */
let waiting = [];

const ready = init({ module_or_path: new URL("./wasm/moewe_bg.wasm", import.meta.url) });

/** @type {Record<string, (args: any) => unknown>} */
const calls = {
  async load({ source, options }) {
    await ready;
    await atRest(drop);
    const files = typeof source === "string" ? await download(source, report, Hash) : folder(source);
    report("upload", 0, 0, "");
    const told = (/** @type {string} */ phase, /** @type {number} */ done, /** @type {number} */ total) =>
      report(phase, done, total, "");
    engine = await WebEngine.load(modelFiles(files), JSON.stringify(options), told);
    return JSON.parse(engine.info());
  },
  unload: () => atRest(drop),
  info: () => atRest(() => JSON.parse(loaded().info())),
  async add({ body }) {
    const added = JSON.parse(await atRest(() => loaded().add(JSON.stringify(body))));
    // Not before the page knows the request's id.
    setTimeout(run);
    return added;
  },
  cancel: ({ id }) => atRest(() => engine?.cancel(id)),
  startProfile: () => atRest(() => loaded().start_profile()),
  kernels: () => atRest(async () => JSON.parse(await loaded().kernels())),
  isCached: ({ url }) => isCached(url),
  clear: ({ url }) => clear(url),
};

self.onmessage = async ({ data: { call, args, ticket } }) => {
  try {
    self.postMessage({ ticket, result: await calls[call](args) });
  } catch (error) {
    self.postMessage({ ticket, error: pack(error) });
  }
};

/** Steps until there is nothing to do. */
async function run() {
  if (stepping) return;
  stepping = true;
  try {
    while (engine?.busy()) {
      const outputs = JSON.parse(await engine.step());
      self.postMessage({ outputs });
      await settle();
    }
  } catch (error) {
    // A panic or a lost device: nothing of this engine can be used again.
    engine = undefined;
    self.postMessage({ failed: pack(error) });
  } finally {
    stepping = false;
    await settle();
  }
}

async function settle() {
  const calls = waiting;
  waiting = [];
  for (const call of calls) await call();
}

/**
 * @template T
 * @param {() => T} call
 * @returns {Promise<Awaited<T>>}
 */
function atRest(call) {
  return new Promise((resolve, reject) => {
    const run = async () => {
      try {
        resolve(await call());
      } catch (error) {
        reject(error);
      }
    };
    if (stepping) waiting.push(run);
    else run();
  });
}

function drop() {
  engine?.free();
  engine = undefined;
}

function loaded() {
  if (!engine) throw named("ModelNotLoadedError", "no model is loaded; call reload first");
  return engine;
}

/**
 * @param {string} phase
 * @param {number} done
 * @param {number} total
 * @param {string} file
 */
function report(phase, done, total, file) {
  self.postMessage({ progress: { phase, done, total, file } });
}

/**
 * A dropped or chosen folder by file name.
 * @param {File[]} list
 */
function folder(list) {
  const files = new Map(list.map((file) => [file.name, file]));
  if (!files.has("config.json")) {
    throw named("ModelError", "the folder has no config.json; choose a model's own folder");
  }
  return files;
}

/** @param {Map<string, Blob>} files */
function modelFiles(files) {
  const reader = new /** @type {any} */ (globalThis).FileReaderSync();
  return {
    open(/** @type {string} */ name) {
      const blob = files.get(name);
      if (!blob) return undefined;
      return {
        size: blob.size,
        read: (/** @type {number} */ start, /** @type {number} */ end) =>
          new Uint8Array(reader.readAsArrayBuffer(blob.slice(start, end))),
      };
    },
  };
}
