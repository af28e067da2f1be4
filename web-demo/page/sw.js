// Keeps the page itself, so that it opens without network; models are kept elsewhere.

const CACHE = "moewe-page";

self.addEventListener("install", () => self.skipWaiting());
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
