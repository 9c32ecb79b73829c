"""Cases of heavy or hostile callers, each run alone and bounded in time.

    python -m benchmarks.heavy_cases NAME --url URL --api-key KEY --adapter NAME --root DIR --seconds S

Prepares its data, prints `ready`, waits for a line on stdin, and then repeats its case for S seconds. At the end it
prints JSON with the number of answers by status. heavy_callers.py runs each with a canary.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

MIB = 1 << 20


class Caller:
    """One tenant's connection to the server, and counts of the answers."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.url: str = args.url
        self.key: str = args.api_key
        self.adapter: str = args.adapter
        self.root = Path(args.root)
        self.seconds: float = args.seconds
        self.answers: Counter[str] = Counter()
        self.until = 0.0

    async def post(self, path: str, body: bytes, limit_s: float = 60.0) -> None:
        """Send one body and read the answer, of whatever status."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=limit_s)
        connector = aiohttp.TCPConnector(force_close=True)
        try:
            async with (
                aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session,
                session.post(self.url + path, data=body) as response,
            ):
                async for _ in response.content.iter_chunked(MIB):
                    pass
            self.answers[str(response.status)] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self.answers[type(error).__name__] += 1

    async def repeat(self, send: Callable[[], Awaitable[None]], at_once: int = 1) -> None:
        """Send repeatedly until the time is over, `at_once` in parallel."""

        async def one() -> None:
            while time.monotonic() < self.until:
                await send()

        await asyncio.gather(*(one() for _ in range(at_once)))

    async def open(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a new connection, and write `data` to it."""
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(data)
        await writer.drain()
        return reader, writer

    def head(self, path: str, *lines: str) -> bytes:
        """Return the head of a POST request up to its last header line, without the empty line after it."""
        fixed = [f"POST {path} HTTP/1.1", "Host: server", f"Authorization: Bearer {self.key}"]
        return "\r\n".join([*fixed, "Content-Type: application/json", *lines]).encode()


Case = Callable[[Caller], Awaitable[Callable[[], Awaitable[None]]]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register a case: it prepares, and returns the coroutine to run."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


def completion(**fields: object) -> bytes:
    return json.dumps({"model": "base", "prompt": "a", "max_tokens": 1} | fields).encode()


@case
async def long_weight(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Name a model by an adapter and a weight of 32 KiB of digits, and of 4 MiB."""
    bodies = [completion(model=f"{caller.adapter}:{zeros}") for zeros in ("9" * 32768 + "x", "1." + "0" * (4 * MIB))]

    async def send() -> None:
        for body in bodies:
            await caller.post("/v1/completions", body)

    return lambda: caller.repeat(send)


@case
async def unknown_models(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Request models that do not exist, eight at a time."""
    body = completion(model="customer-99999/suport" * 20)
    return lambda: caller.repeat(lambda: caller.post("/v1/completions", body), at_once=8)


@case
async def long_prompts(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Send prompts of 7 MiB, four at a time."""
    body = completion(prompt="hello world, this is a prompt. " * (7 * MIB // 31))
    return lambda: caller.repeat(lambda: caller.post("/v1/completions", body), at_once=4)


@case
async def fitting_prompts(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Send texts as long as the context allows to /tokenize, four at a time."""
    body = json.dumps({"model": "base", "prompt": "hello world, this is a prompt. " * 900}).encode()
    return lambda: caller.repeat(lambda: caller.post("/tokenize", body), at_once=4)


@case
async def deep_json(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Send deeply nested lists, in a message and as a tool call's arguments."""
    deep = "[" * 50_000 + "]" * 50_000
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": deep}}]}
    bodies = [
        b'{"model": "base", "messages": [{"role": "user", "content": ' + b"[" * 600 + b"]" * 600 + b"}]}",
        json.dumps({"model": "base", "messages": [{"role": "user", "content": "a"}, message]}).encode(),
    ]

    async def send() -> None:
        for body in bodies:
            await caller.post("/v1/chat/completions", body)

    return lambda: caller.repeat(send)


@case
async def many_choices(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Send 128 prompts of 2,000 token ids with 16 choices each in one request, and cancel it after a second."""
    body = completion(prompt=[[i % 1000 + 5 for i in range(2000)]] * 128, n=16, max_tokens=8)
    return lambda: caller.repeat(lambda: caller.post("/v1/completions", body, limit_s=1.0))


@case
async def weights_of_one_adapter(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Request 900 compositions of one adapter at once, each with another weight."""
    bodies = [completion(model=f"{caller.adapter}:{1 + i / 1000}") for i in range(900)]

    async def send() -> None:
        await asyncio.gather(*(caller.post("/v1/completions", body, limit_s=20.0) for body in bodies))

    return lambda: caller.repeat(send)


@case
async def half_heads(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Open 500 connections whose request head never ends."""
    return lambda: _hold(caller, caller.head("/v1/completions"), 500)


@case
async def slow_bodies(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Send only one byte of each of 1,030 bodies."""
    return lambda: _hold(caller, caller.head("/v1/completions", "Content-Length: 100") + b"\r\n\r\n{", 1030)


async def _hold(caller: Caller, data: bytes, count: int) -> None:
    """Open connections that send only `data`, until the time is over."""
    writers = []
    for _ in range(count):
        try:
            writers.append((await caller.open(data))[1])
            caller.answers["opened"] += 1
        except OSError as error:
            caller.answers[type(error).__name__] += 1
    await asyncio.sleep(max(0.0, caller.until - time.monotonic()))
    for writer in writers:
        writer.close()


@case
async def slow_readers(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Read 50 streams at a byte a second."""
    body = completion(max_tokens=1000, stream=True, ignore_eos=True, n=1)
    data = caller.head("/v1/completions", f"Content-Length: {len(body)}") + b"\r\n\r\n" + body

    async def read() -> None:
        reader, writer = await caller.open(data)
        reader._limit = 1  # type: ignore[attr-defined]  # else the client itself reads ahead
        for _ in range(int(caller.seconds)):
            if not await reader.read(1):
                caller.answers["cut off"] += 1
                break
            await asyncio.sleep(0.9)
        else:
            caller.answers["read on"] += 1
        writer.close()

    async def run() -> None:
        results = await asyncio.gather(*(read() for _ in range(50)), return_exceptions=True)
        caller.answers["refused"] += sum(isinstance(result, OSError) for result in results)

    return run


@case
async def scrapes(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Scrape /metrics without a pause."""

    async def scrape() -> None:
        headers = {"Authorization": f"Bearer {caller.key}"}
        async with aiohttp.ClientSession(headers=headers) as session, session.get(caller.url + "/metrics") as response:
            await response.read()
            caller.answers[str(response.status)] += 1

    return lambda: caller.repeat(scrape)


def _adapter(caller: Caller, name: str) -> Path:
    """Return a copy of the adapter for a case to corrupt."""
    directory = caller.root / name
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(caller.root / "good", directory)
    return directory


async def _load(caller: Caller, directory: Path) -> None:
    body = json.dumps({"lora_name": directory.name, "lora_path": str(directory), "load_inplace": True}).encode()
    await caller.post("/v1/load_lora_adapter", body)


@case
async def endless_regular_expression(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Load adapters whose alpha_pattern never ends in a backtracking matcher."""
    directory = _adapter(caller, "endless")
    config = json.loads((directory / "adapter_config.json").read_text())
    config["alpha_pattern"] = {r"(([a-z_.0-9])+)+!": 3}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return lambda: caller.repeat(lambda: _load(caller, directory))


@case
async def fifo_among_files(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Load an adapter whose weights file is a FIFO, on which a plain open blocks."""
    directory = _adapter(caller, "fifo")
    (directory / "adapter_model.safetensors").unlink()
    os.mkfifo(directory / "adapter_model.safetensors")
    return lambda: caller.repeat(lambda: _load(caller, directory), at_once=4)


@case
async def huge_template(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Load an adapter whose chat template has 1 MiB."""
    directory = _adapter(caller, "template")
    (directory / "chat_template.jinja").write_text("{% if messages %}x{% endif %}" * (MIB // 29))
    return lambda: caller.repeat(lambda: _load(caller, directory))


@case
async def loads(caller: Caller) -> Callable[[], Awaitable[None]]:
    """Load one good adapter in place repeatedly."""
    directory = _adapter(caller, "loaded")
    return lambda: caller.repeat(lambda: _load(caller, directory))


async def run(args: argparse.Namespace) -> None:
    caller = Caller(args)
    go = await CASES[args.name](caller)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    caller.until = time.monotonic() + caller.seconds
    task = asyncio.ensure_future(go())
    # An answer that takes longer than the interval is missing from the counts.
    done, _ = await asyncio.wait([task], timeout=caller.seconds)
    if not done:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    else:
        task.result()
    print(json.dumps(caller.answers), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="One heavy caller.")
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--url", required=True)
    parser.add_argument("--api-key", required=True)
    parser.add_argument("--adapter", required=True, help="a served adapter's name")
    parser.add_argument("--root", required=True, help="directory to load adapters from; contains one named good")
    parser.add_argument("--seconds", type=float, default=6.0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
