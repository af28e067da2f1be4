// A model's files: fetched with progress, checked, kept in the browser's private file system, and
// handed out as blobs. Runs in a worker; knows names and bytes, and no model.

import { named } from "./errors.js";

/** @typedef {{ size?: number, sha256?: string }} Expected */
/** @typedef {{ size: number, sha256?: string, etag?: string, done: boolean }} Kept */
/** @typedef {new () => { update(bytes: Uint8Array): void, digest(): string }} HashClass */
/** @typedef {(phase: string, done: number, total: number, file: string) => void} Report */

const ROOT = "moewe";
const STATE = "state.json";
const ATTEMPTS = 4;

/** Files of a directory that has no manifest; those marked false may be absent. */
const USUAL = {
  "config.json": true,
  "generation_config.json": false,
  "tokenizer.json": true,
  "tokenizer_config.json": false,
  "chat_template.jinja": false,
};

/**
 * The files of the model at a URL, from the cache as far as they are there.
 * @param {string} url directory that holds config.json
 * @param {Report} report
 * @param {HashClass} Hash
 * @returns {Promise<Map<string, Blob>>}
 */
export async function download(url, report, Hash) {
  const base = url.endsWith("/") ? url : `${url}/`;
  const store = await openStore(base);
  const wanted = await listFiles(base, store);
  const total = [...wanted.values()].reduce((sum, file) => sum + (file.size ?? 0), 0);
  await checkRoom(total - store.bytes());
  let before = 0;
  const blobs = new Map();
  for (const [name, expected] of wanted) {
    const at = before;
    const progress = (/** @type {string} */ phase, /** @type {number} */ done) =>
      report(phase, at + done, Math.max(total, at + done), name);
    const blob = await store.file(name, expected, base, progress, Hash);
    before += blob.size;
    blobs.set(name, blob);
  }
  return blobs;
}

/**
 * Names and, where a manifest tells, sizes and hashes.
 * @param {string} base
 * @param {Store} store
 * @returns {Promise<Map<string, Expected>>}
 */
async function listFiles(base, store) {
  let manifest;
  try {
    manifest = await fetchJson(`${base}manifest.json`);
  } catch (error) {
    // Without network the cache is as good, if it is complete.
    if (store.complete()) return store.names();
    throw error;
  }
  if (manifest?.files && typeof manifest.files === "object") {
    return new Map(Object.entries(manifest.files).filter(([name]) => isModelFile(name)));
  }
  const wanted = new Map();
  for (const [name, needed] of Object.entries(USUAL)) {
    if (needed || (await exists(base + name))) wanted.set(name, {});
  }
  const index = await fetchJson(`${base}model.safetensors.index.json`);
  const shards = new Set(/** @type {string[]} */ (Object.values(index?.weight_map ?? {})));
  if (shards.size > 0) wanted.set("model.safetensors.index.json", {});
  for (const name of shards.size > 0 ? shards : ["model.safetensors"]) wanted.set(name, {});
  return wanted;
}

/** What a loaded model reads; a directory may hold more.
 * @param {string} name */
function isModelFile(name) {
  return name in USUAL || /^[^/\\]+\.safetensors(\.index\.json)?$/.test(name);
}

/** The JSON at a URL; undefined where there is none.
 * @param {string} url */
async function fetchJson(url) {
  const response = await request(url, {});
  if (response.status === 404) return undefined;
  if (!response.ok) throw refused(url, response);
  const text = await response.text();
  try {
    return JSON.parse(text);
  } catch {
    // Servers of single-page applications answer anything with their page.
    return undefined;
  }
}

/** @param {string} url */
async function exists(url) {
  const { ok } = await request(url, { method: "HEAD" });
  return ok;
}

/**
 * @param {string} url
 * @param {RequestInit} init
 */
async function request(url, init) {
  try {
    return await fetch(url, init);
  } catch (error) {
    const cause = /** @type {Error} */ (error).message;
    throw named("DownloadError", `${url} cannot be fetched (${cause}); check the network and try again`);
  }
}

/**
 * @param {string} url
 * @param {Response} response
 */
function refused(url, response) {
  return named("DownloadError", `${url} answered ${response.status}; check the model's address`);
}

/** @param {number} bytes still to come */
async function checkRoom(bytes) {
  const { quota, usage } = (await navigator.storage?.estimate?.()) ?? {};
  if (quota !== undefined && usage !== undefined && bytes > quota - usage) {
    const [needs, free] = [bytes, quota - usage].map((n) => `${Math.ceil(n / 2 ** 20)} MiB`);
    throw named("StorageFullError", `the model needs ${needs} but the browser grants ${free}; free some space`);
  }
}

/** Where the files of one model are kept. @param {string} base */
async function openStore(base) {
  try {
    const root = await navigator.storage.getDirectory();
    const parent = await root.getDirectoryHandle(ROOT, { create: true });
    const dir = await parent.getDirectoryHandle(await key(base), { create: true });
    return await Store.open(dir, base);
  } catch (error) {
    // Private windows of some browsers have none: then nothing is kept.
    console.warn("moewe keeps no model:", error);
    return new Store(undefined, base, {});
  }
}

/** @param {string} text */
async function key(text) {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return [...new Uint8Array(digest).slice(0, 16)].map((b) => b.toString(16).padStart(2, "0")).join("");
}

class Store {
  /**
   * @param {FileSystemDirectoryHandle | undefined} dir
   * @param {string} base
   * @param {Record<string, Kept>} files
   */
  constructor(dir, base, files) {
    this.dir = dir;
    this.base = base;
    this.files = files;
  }

  /**
   * @param {FileSystemDirectoryHandle} dir
   * @param {string} base
   */
  static async open(dir, base) {
    try {
      const text = await (await (await dir.getFileHandle(STATE)).getFile()).text();
      return new Store(dir, base, JSON.parse(text).files);
    } catch {
      return new Store(dir, base, {});
    }
  }

  bytes() {
    return Object.values(this.files).reduce((sum, file) => sum + (file.done ? file.size : 0), 0);
  }

  complete() {
    const all = Object.values(this.files);
    return all.length > 0 && "config.json" in this.files && all.every((file) => file.done);
  }

  /** @returns {Map<string, Expected>} */
  names() {
    return new Map(Object.entries(this.files).map(([name, { size, sha256 }]) => [name, { size, sha256 }]));
  }

  async save() {
    if (!this.dir) return;
    const handle = await this.dir.getFileHandle(STATE, { create: true });
    const file = await handle.createWritable();
    await file.write(JSON.stringify({ url: this.base, files: this.files }));
    await file.close();
  }

  /**
   * One file, downloaded unless it is here.
   * @param {string} name
   * @param {Expected} expected
   * @param {string} base
   * @param {(phase: string, done: number) => void} progress
   * @param {HashClass} Hash
   * @returns {Promise<Blob>}
   */
  async file(name, expected, base, progress, Hash) {
    const kept = this.files[name];
    const fresh = kept?.done && (expected.sha256 ?? kept.sha256) === kept.sha256;
    if (fresh && this.dir) {
      const blob = await (await this.dir.getFileHandle(name)).getFile();
      if (blob.size === (expected.size ?? kept.size)) {
        progress("cache", blob.size);
        return blob;
      }
    }
    const part = this.dir ? await FilePart.open(this.dir, name) : new MemoryPart();
    const state = (this.files[name] = { size: 0, sha256: expected.sha256, etag: kept?.etag, done: false });
    try {
      const told = (/** @type {number} */ done) => progress("fetch", done);
      const digest = await fetchInto(part, Hash, base + name, expected, state, told);
      if (expected.sha256 && digest !== expected.sha256) {
        part.truncate();
        const cure = "it was removed; try again";
        throw named("IntegrityError", `${name} was damaged on its way (its SHA-256 is not the manifest's), so ${cure}`);
      }
      Object.assign(state, { size: part.size, done: true });
    } finally {
      part.close();
      await this.save();
    }
    return part.blob();
  }
}

/**
 * Fetches a file from where the part ends; a broken connection is taken up again. Gives the hash
 * of the whole.
 * @param {FilePart | MemoryPart} part
 * @param {HashClass} Hash
 * @param {string} url
 * @param {Expected} expected
 * @param {Kept} state
 * @param {(done: number) => void} progress
 */
async function fetchInto(part, Hash, url, expected, state, progress) {
  let hash = new Hash();
  part.each((bytes) => hash.update(bytes));
  let size = expected.size;
  for (let attempt = 1; size === undefined || part.size !== size; attempt += 1) {
    const start = part.size;
    const headers = new Headers();
    if (start > 0) {
      headers.set("range", `bytes=${start}-`);
      if (state.etag) headers.set("if-range", state.etag);
    }
    const response = await request(url, { headers });
    if (start > 0 && response.status !== 206) {
      // Another version, or a server without ranges: from the beginning.
      part.truncate();
      hash = new Hash();
      throwUnless(attempt < ATTEMPTS, url, 0, size);
      if (response.status === 416) continue;
    }
    if (!response.ok) throw refused(url, response);
    state.etag = response.headers.get("etag") ?? undefined;
    const length = response.headers.get("content-length");
    const encoded = response.headers.has("content-encoding");
    if (size === undefined && length !== null && !encoded) size = part.size + Number(length);
    try {
      for await (const bytes of chunks(response)) {
        part.append(bytes);
        hash.update(bytes);
        progress(part.size);
      }
      if (size === undefined) break;
    } catch (error) {
      if (/** @type {Error} */ (error).name === "QuotaExceededError") {
        throw named("StorageFullError", `no space is left for ${url}; free some space`);
      }
    }
    if (size !== undefined && part.size > size) {
      part.truncate();
      hash = new Hash();
    }
    throwUnless(part.size === size || attempt < ATTEMPTS, url, part.size, size);
    if (part.size !== size) await new Promise((wait) => setTimeout(wait, 200 * attempt));
  }
  return hash.digest();
}

/**
 * @param {boolean} ok
 * @param {string} url
 * @param {number} at
 * @param {number | undefined} size
 */
function throwUnless(ok, url, at, size) {
  if (ok) return;
  const of = size === undefined ? "" : ` of ${size}`;
  throw named("DownloadError", `${url} breaks off at byte ${at}${of}; try again, and it goes on from there`);
}

/** @param {Response} response */
async function* chunks(response) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

/** A file that grows on disk. */
class FilePart {
  /**
   * @param {FileSystemFileHandle} handle
   * @param {any} access FileSystemSyncAccessHandle
   */
  constructor(handle, access) {
    this.handle = handle;
    this.access = access;
    this.size = access.getSize();
  }

  /**
   * @param {FileSystemDirectoryHandle} dir
   * @param {string} name
   */
  static async open(dir, name) {
    const handle = await dir.getFileHandle(name, { create: true });
    try {
      return new FilePart(handle, await /** @type {any} */ (handle).createSyncAccessHandle());
    } catch {
      throw named("StorageError", `${name} is being downloaded in another tab; wait for it or close that tab`);
    }
  }

  /** @param {Uint8Array} bytes */
  append(bytes) {
    this.access.write(bytes, { at: this.size });
    this.size += bytes.length;
  }

  truncate() {
    this.access.truncate(0);
    this.size = 0;
  }

  /** @param {(bytes: Uint8Array) => void} take */
  each(take) {
    const block = new Uint8Array(1 << 20);
    for (let at = 0; at < this.size; ) {
      const n = this.access.read(block, { at });
      take(block.subarray(0, n));
      at += n;
    }
  }

  close() {
    this.access.flush();
    this.access.close();
  }

  blob() {
    return this.handle.getFile();
  }
}

/** The same where nothing can be kept. */
class MemoryPart {
  /** @type {Uint8Array<ArrayBuffer>[]} */
  parts = [];
  size = 0;

  /** @param {Uint8Array} bytes */
  append(bytes) {
    this.parts.push(bytes.slice());
    this.size += bytes.length;
  }

  truncate() {
    this.parts = [];
    this.size = 0;
  }

  /** @param {(bytes: Uint8Array) => void} take */
  each(take) {
    this.parts.forEach(take);
  }

  close() {}

  blob() {
    return new Blob(this.parts);
  }
}

/** Whether all files of a model are here. @param {string} url */
export async function isCached(url) {
  return (await openStore(url.endsWith("/") ? url : `${url}/`)).complete();
}

/** Removes the files of a model, or of all. @param {string} [url] */
export async function clear(url) {
  const root = await navigator.storage.getDirectory();
  try {
    if (url === undefined) return await root.removeEntry(ROOT, { recursive: true });
    const parent = await root.getDirectoryHandle(ROOT);
    await parent.removeEntry(await key(url.endsWith("/") ? url : `${url}/`), { recursive: true });
  } catch (error) {
    if (/** @type {Error} */ (error).name !== "NotFoundError") throw error;
  }
}
