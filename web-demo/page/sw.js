// Keeps the page itself, so that it opens without network; models are kept elsewhere.

const CACHE = "moewe-page";

const FILES = [
  "./",
  "app.js",
  "heat-map.js",
  "style.css",
  "moewe/index.js",
  "moewe/errors.js",
  "moewe/worker.js",
  "moewe/download.js",
  "moewe/wasm/moewe.js",
  "moewe/wasm/moewe_bg.wasm",
];

self.addEventListener("install", (event) => {
  // The page that registers this has fetched its files before.
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES)));
  self.skipWaiting();
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  const page = request.method === "GET" && url.origin === location.origin && !url.pathname.includes("/models/");
  if (page) event.respondWith(answer(request));
});

/** The network's answer, or the last one that it gave. @param {Request} request */
async function answer(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok && response.status === 200) await cache.put(request, response.clone());
    return response;
  } catch (error) {
    const kept = await cache.match(request, { ignoreSearch: true });
    if (kept) return kept;
    throw error;
  }
}
