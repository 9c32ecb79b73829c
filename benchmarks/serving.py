"""Measures any OpenAI-compatible server, ours or a peer's, over HTTP with streamed completions.

    python -m benchmarks.serving --url http://127.0.0.1:8000 [--workload NAME ...] [--api-key KEY]

The base model and the adapters are read from /v1/models (an entry with a `parent` is an adapter).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from benchmarks.measure import Timeline, report, summarise
from benchmarks.workloads import WORKLOADS, BenchRequest, Workload, make_requests

_CHOICE = re.compile(rb'"choices": ?\[\{')
_LAST = re.compile(rb'^data: \{"error"|"usage": ?\{')


@contextlib.asynccontextmanager
async def connect(url: str, api_key: str | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """Return a session without a limit on connections, so that all requests of a workload are open at once."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout, connector=connector) as session:
        yield session


async def models(session: aiohttp.ClientSession) -> tuple[str, list[str]]:
    """Return (base model's name, adapters' names)."""
    async with session.get("/v1/models") as response:
        response.raise_for_status()
        entries = (await response.json())["data"]
    base = next(entry["id"] for entry in entries if not entry.get("parent"))
    return base, [entry["id"] for entry in entries if entry.get("parent")]


async def run(
    session: aiohttp.ClientSession, workload: Workload, requests: list[BenchRequest], base: str
) -> dict[str, Any]:
    """Run a workload once. Raises if a request fails or gets too few tokens."""
    gate = asyncio.Semaphore(workload.concurrency)

    async def one(request: BenchRequest) -> Timeline:
        async with gate:
            return await _complete(session, workload, request, base)

    began = time.perf_counter()
    timelines = await asyncio.gather(*(one(request) for request in requests))
    return summarise(workload, timelines, time.perf_counter() - began)


async def _complete(session: aiohttp.ClientSession, workload: Workload, request: BenchRequest, base: str) -> Timeline:
    body = {
        "model": request.adapter or base,
        "prompt": list(request.prompt_token_ids),
        "max_tokens": workload.num_output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timeline = Timeline(time.perf_counter())
    num_tokens = 0
    rest = b""
    async with session.post("/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {await response.text()}")
        # The client shares the cores with the server, so it parses as little of an event as it can.
        async for data in response.content.iter_any():
            now = time.perf_counter()
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if _CHOICE.search(event):
                    timeline.token_s.append(now)
                if _LAST.search(event):
                    content = json.loads(event.removeprefix(b"data: "))
                    if "error" in content:
                        raise RuntimeError(content["error"])
                    num_tokens = content["usage"]["completion_tokens"]
    if num_tokens != workload.num_output_tokens:
        raise RuntimeError(f"{num_tokens} tokens instead of {workload.num_output_tokens}")
    # A server may send several tokens in an event, or none (half a character); spread the tokens over the events.
    missing = num_tokens - len(timeline.token_s)
    timeline.token_s = sorted(timeline.token_s + [timeline.token_s[-1]] * missing)[:num_tokens]
    return timeline


async def measure(args: argparse.Namespace) -> None:
    async with connect(args.url, args.api_key) as session:
        base, adapters = await models(session)
        rows = []
        warm_up = Workload("warm-up", 4, 4, 64, 8, 0)
        await run(session, warm_up, make_requests(warm_up, adapters, vocab_size=args.vocab_size), base)
        for repeat in range(args.repeat):
            for name in args.workload:
                workload = WORKLOADS[name]
                if workload.num_adapters > len(adapters):
                    print(f"{name}: skipped, the server has {len(adapters)} adapters", file=sys.stderr)
                    continue
                requests = make_requests(workload, adapters, vocab_size=args.vocab_size, seed=repeat)
                rows.append(await run(session, workload, requests, base))
    report(args.url, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure an OpenAI-compatible server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="without /v1")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each workload, interleaved")
    parser.add_argument("--vocab-size", type=int, default=30_000, help="prompt token ids are drawn below this")
    parser.add_argument("--api-key", default=None)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
