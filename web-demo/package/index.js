// moewe for pages: a Mixture-of-Experts model behind OpenAI's calls, running on the visitor's GPU.
// The names follow WebLLM's, so that programs can change over.

import { named } from "./errors.js";

/** @typedef {import("./index.d.ts").Progress} Progress */

/**
 * Loads a model and gives the engine that runs it.
 * @param {string | File[]} model address of a directory with config.json, or its files
 * @param {import("./index.d.ts").EngineOptions} [options]
 */
export async function createEngine(model, options) {
  const engine = new MoeweEngine(options);
  try {
    await engine.reload(model);
  } catch (error) {
    engine.terminate();
    throw error;
  }
  return engine;
}

/**
 * What this browser has and lacks, each lack with its cure.
 * @returns {Promise<import("./index.d.ts").Support>}
 */
export async function checkSupport() {
  const problems = [];
  const gpu = /** @type {any} */ (navigator).gpu;
  const adapter = await gpu?.requestAdapter({ powerPreference: "high-performance" });
  if (!gpu) {
    problems.push(
      named(
        "WebGPUNotAvailableError",
        globalThis.isSecureContext
          ? "this browser has no WebGPU; use a recent Chrome, Edge, Firefox or Safari (webgpureport.org tells more)"
          : "WebGPU needs a secure page; open it over https or as localhost",
      ),
    );
  } else if (!adapter) {
    problems.push(
      named(
        "WebGPUNotFoundError",
        "WebGPU finds no GPU; update the graphics driver, switch on hardware acceleration in the browser's settings, and look at webgpureport.org",
      ),
    );
  }
  const { quota, usage } = (await navigator.storage?.estimate?.()) ?? {};
  return {
    webgpu: Boolean(adapter),
    adapter: adapter ? [adapter.info.vendor, adapter.info.architecture, adapter.info.description].filter(Boolean).join(" ") : "",
    shaderF16: adapter?.features.has("shader-f16") ?? false,
    subgroups: adapter?.features.has("subgroups") ?? false,
    timestamps: adapter?.features.has("timestamp-query") ?? false,
    maxBufferBytes: adapter?.limits.maxStorageBufferBindingSize ?? 0,
    freeStorageBytes: quota !== undefined && usage !== undefined ? quota - usage : undefined,
    problems,
  };
}

export class MoeweEngine {
  /** @type {Map<number, { resolve(value: any): void, reject(error: Error): void }>} */
  #tickets = new Map();
  /** @type {Map<number, Answer>} */
  #answers = new Map();
  #lastTicket = 0;
  /** @type {string | File[] | undefined} */
  #model;
  #started = 0;
  /** @type {import("./index.d.ts").Usage | undefined} */
  #lastUsage;
  /** @type {Worker} */
  #worker;

  /** @param {import("./index.d.ts").EngineOptions} [options] */
  constructor(options = {}) {
    this.options = options;
    /** What is known of the loaded model. @type {import("./index.d.ts").Info | undefined} */
    this.info = undefined;
    this.chat = { completions: { create: (/** @type {any} */ body) => this.#create(body, "chat.completion") } };
    this.completions = { create: (/** @type {any} */ body) => this.#create(body, "text_completion") };
    this.#worker = this.#start();
  }

  /**
   * Loads another model, or the same again, for instance after a `DeviceLostError`.
   * @param {string | File[]} [model]
   */
  async reload(model = this.#model) {
    if (model === undefined) throw named("RequestError", "name the model to load");
    const { webgpu, problems, adapter } = await checkSupport();
    if (!webgpu) throw problems[0];
    // A device that was lost takes its thread's WebAssembly memory with it.
    this.#restart();
    this.#model = model;
    this.#started = performance.now();
    await navigator.storage?.persist?.();
    const { onProgress, workerUrl, ...options } = this.options;
    const source = typeof model === "string" ? new URL(model, location.href).href : [...model];
    const name = typeof model === "string" ? model.replace(/\/+$/, "").split("/").pop() : "folder";
    const info = await this.#call("load", { source, options: { name, ...options } });
    // The engine sees WebGPU's adapters without their names.
    this.info = { ...info, adapter: `${adapter} ${info.adapter}`.trim() };
    return this.info;
  }

  /** Frees the model's memory. */
  async unload() {
    this.info = undefined;
    await this.#call("unload");
  }

  /** Ends the thread; the engine cannot be used afterwards. */
  terminate() {
    this.#fail(named("AbortError", "the engine was terminated"));
    this.#worker.terminate();
  }

  /** Ends all answers where they are; they finish with `finish_reason` "abort". */
  async interruptGenerate() {
    await Promise.all([...this.#answers.values()].map((answer) => answer.abort()));
  }

  /** Forgets the conversation: ends answers and clears the statistics. */
  async resetChat() {
    await this.interruptGenerate();
    this.#lastUsage = undefined;
  }

  /** Tokens and speeds of the last answer. */
  getStats() {
    return this.#lastUsage;
  }

  /** The same as a sentence. */
  runtimeStatsText() {
    const usage = this.#lastUsage;
    if (!usage) return "no answer yet";
    const { time_to_first_token_s: first, decode_tokens_per_s: rate } = usage.extra;
    return `first token after ${first.toFixed(2)} s, then ${rate.toFixed(1)} tokens/s`;
  }

  /** Times every kernel while `work` runs; a table, the longest first.
   * @param {() => Promise<unknown>} work */
  async profile(work) {
    await this.#call("startProfile");
    await work();
    return this.#call("kernels");
  }

  /** Whether a model's files are all in the cache. @param {string} url */
  hasModelInCache(url) {
    return this.#call("isCached", { url: new URL(url, location.href).href });
  }

  /** Removes a model's files from the cache, or those of all models. @param {string} [url] */
  deleteModelInCache(url) {
    return this.#call("clear", { url: url === undefined ? undefined : new URL(url, location.href).href });
  }

  /**
   * @param {any} body
   * @param {"chat.completion" | "text_completion"} object
   */
  async #create(body, object) {
    const begun = performance.now();
    const { id, prompt_tokens } = await this.#call("add", { body });
    const cancel = () => this.#call("cancel", { id });
    const answer = new Answer({ id, prompt_tokens, begun, object, body, model: this.info?.model ?? "", cancel });
    this.#answers.set(id, answer);
    answer.finished.then((usage) => {
      this.#answers.delete(id);
      this.#lastUsage = usage;
    }, () => this.#answers.delete(id));
    return body.stream ? answer.chunks() : answer.whole();
  }

  #start() {
    const url = this.options.workerUrl ?? new URL("./worker.js", import.meta.url);
    const worker = new Worker(url, { type: "module" });
    worker.onmessage = ({ data }) => this.#receive(data);
    worker.onerror = (event) => {
      this.#fail(named("WorkerError", `the engine's thread failed (${event.message || "it does not load"}); reload the page`));
    };
    return worker;
  }

  #restart() {
    if (this.info) {
      this.terminate();
      this.info = undefined;
      this.#worker = this.#start();
    }
  }

  /**
   * @param {string} call
   * @param {object} [args]
   */
  #call(call, args = {}) {
    const ticket = ++this.#lastTicket;
    return new Promise((resolve, reject) => {
      this.#tickets.set(ticket, { resolve, reject });
      this.#worker.postMessage({ call, args, ticket });
    });
  }

  /** @param {any} message */
  #receive({ ticket, result, error, outputs, progress, failed }) {
    if (ticket !== undefined) {
      const waiting = this.#tickets.get(ticket);
      this.#tickets.delete(ticket);
      if (error) waiting?.reject(named(error.name, error.message));
      else waiting?.resolve(result);
    }
    for (const output of outputs ?? []) this.#answers.get(output.id)?.take(output);
    if (progress) this.#report(progress);
    if (failed) this.#fail(named(failed.name, failed.message));
  }

  /** @param {{ phase: Progress["phase"], done: number, total: number, file: string }} progress */
  #report({ phase, done, total, file }) {
    // Shares of the whole as a visitor lives it: the download takes most of the time.
    const [from, to] = { cache: [0, 0.8], fetch: [0, 0.8], upload: [0.8, 0.9], compile: [0.9, 1] }[phase];
    const timeElapsed = (performance.now() - this.#started) / 1000;
    const part = total > 0 ? done / total : 0;
    const mib = (/** @type {number} */ n) => `${(n / 2 ** 20).toFixed(1)} MiB`;
    const what = { cache: "reading from the cache", fetch: "downloading", upload: "moving to the GPU", compile: "compiling shaders" }[phase];
    const text = phase === "compile" || total === 0 ? what : `${what} ${file}: ${mib(done)} of ${mib(total)}`;
    this.options.onProgress?.({
      progress: from + (to - from) * part,
      timeElapsed,
      text,
      phase,
      bytes: done,
      totalBytes: total,
      rate: timeElapsed > 0 ? done / timeElapsed : 0,
    });
  }

  /** @param {Error} error */
  #fail(error) {
    for (const waiting of this.#tickets.values()) waiting.reject(error);
    this.#tickets.clear();
    for (const answer of this.#answers.values()) answer.fail(error);
    this.#answers.clear();
  }
}

/** One answer on its way: takes what steps bring, gives OpenAI's chunks. */
class Answer {
  /** @type {any[]} */
  #outputs = [];
  #tokens = 0;
  #firstAt = 0;
  /** @type {Error | undefined} */
  #error;
  #ended = false;
  #wake = () => {};

  /** @param {{ id: number, prompt_tokens: number, begun: number, object: "chat.completion" | "text_completion", body: any, model: string, cancel(): Promise<unknown> }} from */
  constructor(from) {
    this.from = from;
    this.created = Math.floor(Date.now() / 1000);
    /** @type {Promise<import("./index.d.ts").Usage>} */
    this.finished = new Promise((resolve, reject) => Object.assign(this, { resolve, reject }));
    this.finished.catch(() => {});
  }

  /** @param {any} output */
  take(output) {
    if (output.token !== null) {
      this.#tokens += 1;
      if (this.#tokens === 1) this.#firstAt = performance.now();
    }
    if (output.finish === "error") {
      this.fail(named("ModelError", "the model's output is not a number; load it again"));
      return;
    }
    this.#push(output);
  }

  async abort() {
    await this.from.cancel();
    this.#push({ text: "", token: null, experts: [], finish: "abort" });
  }

  /** @param {Error} error */
  fail(error) {
    this.#error = error;
    /** @type {any} */ (this).reject(error);
    this.#wake();
  }

  /** @param {any} output */
  #push(output) {
    if (this.#ended) return;
    this.#ended = output.finish !== null;
    this.#outputs.push(output);
    if (this.#ended) /** @type {any} */ (this).resolve(this.usage());
    this.#wake();
  }

  /** @returns {import("./index.d.ts").Usage} */
  usage() {
    const { prompt_tokens, begun } = this.from;
    const [first, now] = [(this.#firstAt || performance.now()) - begun, performance.now()];
    const decode = (now - (this.#firstAt || now)) / 1000;
    return {
      prompt_tokens,
      completion_tokens: this.#tokens,
      total_tokens: prompt_tokens + this.#tokens,
      extra: {
        time_to_first_token_s: first / 1000,
        decode_tokens_per_s: decode > 0 ? Math.max(this.#tokens - 1, 0) / decode : 0,
        e2e_latency_s: (now - begun) / 1000,
      },
    };
  }

  async *#steps() {
    try {
      for (let at = 0; ; at += 1) {
        while (at >= this.#outputs.length && !this.#error) {
          await new Promise((wake) => (this.#wake = () => wake(undefined)));
        }
        if (at >= this.#outputs.length) throw this.#error;
        yield this.#outputs[at];
        if (this.#outputs[at].finish !== null) return;
      }
    } finally {
      // Whoever leaves the loop wants no more.
      if (!this.#ended && !this.#error) await this.abort();
    }
  }

  /**
   * @param {object} choice
   * @param {string} object
   */
  #frame(choice, object) {
    const { id, model } = this.from;
    return { id: `${object.startsWith("chat") ? "chatcmpl" : "cmpl"}-${id}`, object, created: this.created, model, choices: [choice] };
  }

  async *chunks() {
    const chat = this.from.object === "chat.completion";
    const object = chat ? "chat.completion.chunk" : "text_completion";
    if (chat) yield this.#frame({ index: 0, delta: { role: "assistant", content: "" }, finish_reason: null }, object);
    for await (const { text, token, experts, finish } of this.#steps()) {
      const said = chat ? { delta: text ? { content: text } : {} } : { text };
      yield { ...this.#frame({ index: 0, ...said, finish_reason: finish }, object), moewe: { token, experts } };
    }
    if (this.from.body.stream_options?.include_usage) {
      yield { ...this.#frame({}, object), choices: [], usage: this.usage() };
    }
  }

  async whole() {
    let text = "";
    let finish_reason = null;
    for await (const output of this.#steps()) {
      text += output.text;
      finish_reason = output.finish;
    }
    const chat = this.from.object === "chat.completion";
    const said = chat ? { message: { role: "assistant", content: text } } : { text };
    return { ...this.#frame({ index: 0, ...said, finish_reason }, this.from.object), usage: this.usage() };
  }
}
