// The page: loads a model, chats with it, shows its experts.

import { MoeweEngine, checkSupport } from "./moewe/index.js";
import { HeatMap } from "./heat-map.js";

/** @param {string} id */
const $ = (id) => /** @type {any} */ (document.getElementById(id));

const heat = new HeatMap($("heat"));
/** @type {MoeweEngine | undefined} */
let engine;
/** @type {{ role: string, content: string }[]} */
let conversation = [];
/** @type {(() => Promise<void>) | undefined} what "Try again" does */
let retry;

const query = new URLSearchParams(location.search);
$("model").value = query.get("model") ?? "models/gull-20m";

navigator.serviceWorker?.register("sw.js").catch(() => {
  // The page then needs the network each time.
});

start();

/** @returns {Promise<void>} */
async function start() {
  empty();
  const { problems } = await checkSupport();
  if (problems.length > 0) return complain(problems[0], () => start());
  $("status").textContent = "Ready to load a model.";
  if (query.has("load")) await load($("model").value);
}

/** @param {string | File[]} model */
async function load(model) {
  $("problem").hidden = true;
  $("progress").hidden = false;
  busy(true);
  // Gigabytes of memory of the model before are free then.
  engine?.terminate();
  engine = new MoeweEngine({ onProgress: showProgress });
  const loading = engine;
  try {
    const info = await loading.reload(model);
    heat.setLayers(info.moe_layers);
    facts(info);
    $("status").textContent = "The model is loaded.";
    $("measure").disabled = !info.timestamps;
    $("kernels-note").textContent = info.timestamps ? "" : "This browser's GPU gives no timestamps.";
    busy(false);
    $("prompt").focus();
  } catch (error) {
    if (loading === engine) complain(error, () => load(model));
  } finally {
    if (loading === engine) $("progress").hidden = true;
  }
}

/** @param {import("./moewe/index.d.ts").Progress} progress */
function showProgress({ progress, text }) {
  $("progress").value = progress;
  $("status").textContent = text;
}

/** @param {import("./moewe/index.d.ts").Info} info */
function facts(info) {
  const mib = (/** @type {number} */ n) => `${(n / 2 ** 20).toFixed(1)} MiB`;
  const [first] = info.moe_layers;
  const rows = {
    Model: `${info.model} (${info.architecture})`,
    Adapter: info.adapter,
    Experts: first ? `${first.experts} per layer, ${first.top_k} per token, ${info.moe_layers.length} layers` : "none",
    Memory: `${mib(info.weight_bytes)} of weights, ${mib(info.device_bytes)} in all`,
    Context: `${info.context} tokens`,
  };
  $("facts").replaceChildren(
    ...Object.entries(rows).flatMap(([name, value]) => [element("dt", name), element("dd", value)]),
  );
  $("facts").hidden = false;
}

/**
 * @param {any} error
 * @param {() => Promise<void>} cure
 */
function complain(error, cure) {
  retry = cure;
  $("problem-text").textContent = `${error.name}: ${error.message}`;
  $("problem").hidden = false;
  $("status").textContent = "";
  $("again").textContent = error.name === "DeviceLostError" ? "Load the model again" : "Try again";
  busy(true);
}

/** @param {boolean} on whether nothing can be asked now */
function busy(on) {
  $("send").disabled = on;
  $("reset").disabled = on;
}

function empty() {
  $("messages").replaceChildren(element("li", "Nothing said yet.", "empty"));
}

/**
 * @param {string} tag
 * @param {string} text
 * @param {string} [className]
 */
function element(tag, text, className = "") {
  return Object.assign(document.createElement(tag), { textContent: text, className });
}

/** @param {string} text */
async function ask(text) {
  if (!engine) return;
  $("messages").querySelector(".empty")?.remove();
  conversation.push({ role: "user", content: text });
  $("messages").append(element("li", text, "user"));
  const answer = $("messages").appendChild(element("li", "", "assistant"));
  answer.tabIndex = 0;
  busy(true);
  $("stop").disabled = false;
  let said = "";
  try {
    const chunks = await engine.chat.completions.create({ messages: conversation, stream: true, ...sampling() });
    for await (const { choices, moewe } of chunks) {
      const content = choices[0].delta.content ?? "";
      said += content;
      if (moewe?.experts.length) {
        answer.append(token(content, moewe.experts));
        heat.add(moewe.experts);
        $("messages").scrollTop = $("messages").scrollHeight;
      } else if (content) {
        answer.append(content);
      }
    }
    $("speed").textContent = engine.runtimeStatsText();
    conversation.push({ role: "assistant", content: said });
    busy(false);
  } catch (error) {
    conversation.pop();
    if (/** @type {Error} */ (error).name === "RequestError") busy(false);
    complain(error, /** @type {Error} */ (error).name === "RequestError" ? async () => {} : again);
    if (/** @type {Error} */ (error).name === "RequestError") busy(false);
  } finally {
    $("stop").disabled = true;
  }
}

/** Loads the same model again, from the cache. */
async function again() {
  await load(chosen ?? $("model").value);
}

/** @type {string | File[] | undefined} */
let chosen;

/**
 * @param {string} text
 * @param {number[]} experts
 */
function token(text, experts) {
  const span = element("span", text, "token");
  span.addEventListener("pointerenter", () => point(span, experts));
  span.addEventListener("pointerleave", () => point());
  span.addEventListener("point", () => point(span, experts));
  return span;
}

/**
 * Shows the experts of a token, or all of them again.
 * @param {HTMLElement} [span]
 * @param {number[]} [experts]
 */
function point(span, experts) {
  document.querySelector(".token.chosen")?.classList.remove("chosen");
  span?.classList.add("chosen");
  heat.show(experts);
  $("chosen").textContent = span && experts ? `“${span.textContent}” was written by ${heat.describe(experts)}` : "";
}

function sampling() {
  const number = (/** @type {string} */ id) => ($(id).value === "" ? undefined : Number($(id).value));
  const names = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
  return Object.fromEntries(names.map((name) => [name, number(name)]).filter(([, value]) => value !== undefined));
}

$("load-form").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  chosen = $("model").value;
  load($("model").value);
});
$("folder").addEventListener("change", () => {
  chosen = [...$("folder").files];
  if (chosen.length > 0) load(chosen);
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  chosen = await dropped(event);
  if (chosen.length > 0) load(chosen);
});
$("again").addEventListener("click", () => {
  $("problem").hidden = true;
  retry?.();
});
$("clear").addEventListener("click", async () => {
  const cleaner = engine ?? new MoeweEngine();
  await cleaner.deleteModelInCache();
  if (cleaner !== engine) cleaner.terminate();
  $("status").textContent = "The cache is empty.";
});
$("ask").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || $("send").disabled) return;
  $("prompt").value = "";
  ask(text);
});
$("prompt").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => engine?.interruptGenerate());
$("reset").addEventListener("click", async () => {
  await engine?.resetChat();
  conversation = [];
  $("speed").textContent = "";
  point();
  empty();
});
$("messages").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, Escape: 0 }[event.key];
  const message = /** @type {HTMLElement} */ (event.target).closest("li");
  if (step === undefined || !message) return;
  event.preventDefault();
  if (step === 0) return point();
  const tokens = [...message.querySelectorAll(".token")];
  const at = tokens.findIndex((span) => span.classList.contains("chosen"));
  const next = at < 0 ? (step > 0 ? 0 : tokens.length - 1) : Math.min(Math.max(at + step, 0), tokens.length - 1);
  tokens[next]?.dispatchEvent(new Event("point"));
});
$("measure").addEventListener("click", async () => {
  if (!engine) return;
  $("measure").disabled = true;
  const running = engine;
  const body = { prompt: "Once upon a time", max_tokens: 8, temperature: 0, ignore_eos: true };
  try {
    const rows = await running.profile(() => running.completions.create(body));
    const cells = rows.map(({ kernel, calls, ms }) => [kernel, String(calls), ms.toFixed(2)]);
    $("kernel-table").tBodies[0].replaceChildren(
      ...cells.map((row) => {
        const tr = document.createElement("tr");
        tr.append(...row.map((cell) => element("td", cell)));
        return tr;
      }),
    );
    $("kernel-table").hidden = false;
  } catch (error) {
    complain(error, again);
  } finally {
    $("measure").disabled = false;
  }
});

/** Files of a dropped folder, or dropped files. @param {DragEvent} event */
async function dropped(event) {
  const items = [...(event.dataTransfer?.items ?? [])].map((item) => item.webkitGetAsEntry?.());
  const files = [];
  for (const entry of items) {
    for (const file of entry?.isDirectory ? await children(entry) : entry ? [entry] : []) {
      if (file.isFile) files.push(await new Promise((resolve, reject) => /** @type {any} */ (file).file(resolve, reject)));
    }
  }
  return files;
}

/**
 * @param {any} directory
 * @returns {Promise<FileSystemEntry[]>}
 */
async function children(directory) {
  const reader = directory.createReader();
  const all = [];
  for (;;) {
    // A hundred at a time.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (some.length === 0) return all;
    all.push(...some);
  }
}
