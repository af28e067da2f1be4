#!/usr/bin/env python3
"""What a long day does to a server: many short requests, or clients killed in mid-stream.

    tests/clients/soak.py [--url http://127.0.0.1:8000] [--pid PID] [--requests 10000] [--kill 1000]

Prints memory and cache use as JSON lines; exits with 1 if blocks or requests are left behind, a
request fails, or memory grows by more than 2 % in the second half: the first makes the plans of
all shapes of steps. Needs only Python.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import struct
import sys
import urllib.parse
import urllib.request

WATCHED = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def sample(url: str, pid: int | None) -> dict[str, float]:
    """Metrics and resident memory, in bytes, now."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    wanted = (*WATCHED, "vllm_moe_device_bytes")
    found = {name: float(re.search(rf"^{name}{{.*}} (.*)$", text, re.M)[1]) for name in wanted}
    if pid:
        status = open(f"/proc/{pid}/status").read()
        found["rss"] = int(re.search(r"VmRSS:\s*(\d+) kB", status)[1]) * 1024
        found["threads"] = int(re.search(r"Threads:\s*(\d+)", status)[1])
    return found


def request(host: str, i: int, stream: bool, tokens: int) -> bytes:
    """A request with a prompt of token ids, as models without a tokenizer take it."""
    prompt = random.Random(i).choices(range(3, 256), k=8)
    fields = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    body = json.dumps(fields)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


async def answered(host: str, port: int, i: int) -> bool:
    """Whether a short request, whole or streamed, is answered to its end."""
    reader, writer = await asyncio.open_connection(host, port)
    stream = i % 2 == 0
    wire = request(host, i, stream, 4).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    writer.write(wire)
    answer = await asyncio.wait_for(reader.read(), 120)
    writer.close()
    return answer.startswith(b"HTTP/1.1 200") and (b"[DONE]" if stream else b'"usage"') in answer


async def killed(host: str, port: int, i: int) -> bool:
    """A client that vanishes somewhere in its answer, with a reset."""
    chance = random.Random(i)
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request(host, i, chance.random() < 0.8, 100))
    try:
        await asyncio.wait_for(reader.read(chance.randrange(1, 4000)), chance.random() * 0.3)
    except TimeoutError:
        pass
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    return True


async def many(url: str, pid: int | None, n: int, concurrency: int, one) -> bool:
    """Runs `one` n times; whether all was well and memory flat."""
    target = urllib.parse.urlsplit(url)
    gate, good, samples = asyncio.Semaphore(concurrency), 0, []

    async def gated(i: int) -> bool:
        async with gate:
            return await one(target.hostname, target.port, i)

    tenth = max(1, n // 10)
    for start in range(0, n, tenth):
        part = range(start, min(n, start + tenth))
        good += sum(await asyncio.gather(*(gated(i) for i in part)))
        for _ in range(100):
            now = await asyncio.to_thread(sample, url, pid)
            if not any(now[name] for name in WATCHED):
                break
            await asyncio.sleep(0.1)
        samples.append(now)
        line = {"what": one.__name__, "done": part.stop, "good": good, **now}
        print(json.dumps(line), flush=True)
    left = any(samples[-1][name] for name in WATCHED)
    half, last = samples[len(samples) // 2], samples[-1]
    grown = any(last[k] > 1.02 * half[k] for k in ("rss", "vllm_moe_device_bytes") if k in last)
    return good == n and not left and not grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, help="the server's, to watch its memory")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kill", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    well = True
    for n, one in ((args.kill, killed), (args.requests, answered)):
        if n:
            well &= asyncio.run(many(args.url, args.pid, n, args.concurrency, one))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
