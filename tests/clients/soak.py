#!/usr/bin/env python3
"""What a long day does to a server: many short requests, clients killed in mid-stream, and clients
that stop reading.

    tests/clients/soak.py [--url http://127.0.0.1:8000] [--pid PID]
        [--requests 10000] [--kill 1000] [--stall 64]

Prints memory and cache use as JSON lines; exits with 1 if blocks or requests are left behind, a
request fails, or memory grows by more than 2 % in the second half: the first makes the plans of
all shapes of steps. Clients that stop reading must not make others wait: the 99th percentile of
the time between two events is set beside that of as many clients that read. Needs only Python.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import statistics
import struct
import sys
import time
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


def request(host: str, i: int, stream: bool, tokens: int, **more) -> bytes:
    """A request with a prompt of token ids, as models without a tokenizer take it."""
    prompt = random.Random(i).choices(range(3, 256), k=8)
    fields = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream, **more}
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


async def neighbour(host: str, port: int, i: int, reads: bool) -> None:
    """A stream of more than sockets hold, whose client stops to read at once, or goes on."""
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, (host, port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=4096)
        writer.write(request(host, i, True, 200, logprobs=20))
        if reads:
            while await reader.read(4096):
                pass
        else:
            await reader.read(1)
            await asyncio.sleep(120)


async def gaps(host: str, port: int, i: int) -> list[float]:
    """Seconds between the events of a stream that is read."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request(host, i, True, 100))
    times = []
    while (line := await reader.readline()) and b"[DONE]" not in line:
        if line.startswith(b"data:"):
            times.append(time.perf_counter())
    writer.close()
    return [b - a for a, b in zip(times, times[1:])]


async def percentile(url: str, n: int, reads: bool) -> float:
    """99th percentile of the gaps of 8 streams beside `n` others that are read, or are not."""
    target = urllib.parse.urlsplit(url)
    place = target.hostname, target.port
    streams = [asyncio.create_task(gaps(*place, n + i)) for i in range(8)]
    await asyncio.sleep(0.05)
    others = [asyncio.create_task(neighbour(*place, i, reads)) for i in range(n)]
    found = await asyncio.gather(*streams)
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    ordered = sorted(gap for stream in found for gap in stream)
    return ordered[len(ordered) * 99 // 100]


async def stalled(url: str, n: int) -> bool:
    """Whether streams are as even beside clients that stop reading as beside others."""
    # In turns, for the machine's speed changes.
    rounds = [[await percentile(url, n, reads) for reads in (True, False)] for _ in range(5)]
    read, unread = (statistics.median(column) for column in zip(*rounds))
    seconds = {"p99 beside clients that read": read, "that do not": unread}
    print(json.dumps({"what": "stalled", **seconds}))
    return unread < 1.1 * read


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
    parser.add_argument("--stall", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    well = True
    for n, one in ((args.kill, killed), (args.requests, answered)):
        if n:
            well &= asyncio.run(many(args.url, args.pid, n, args.concurrency, one))
    if args.stall:
        well &= asyncio.run(stalled(args.url, args.stall))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
