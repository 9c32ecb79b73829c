"""A tenant with small requests: one endless stream, and one-token requests in sequence; measures how long it waits.

Owns: its requests, and the longest wait of an interval. Leaves to others: the load next to it (heavy_cases.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp

REQUEST_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Waits:
    """The longest waits of one interval, in seconds, and its failures."""

    stream_gap_s: float  # between two events of the stream, or since the last one
    request_s: float  # from sending a one-token request to the end of its answer, or until now
    errors: tuple[str, ...]


@dataclass(slots=True)
class _Watch:
    """The time of the last event, and the longest wait since the interval began."""

    last_s: float = field(default_factory=time.monotonic)
    longest_s: float = 0.0

    def came(self) -> None:
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - self.last_s)
        self.last_s = now

    def take(self) -> float:
        """Return the longest wait, including the current one, and begin a new interval."""
        longest, self.longest_s = max(self.longest_s, time.monotonic() - self.last_s), 0.0
        return longest


class Canary:
    """The canary: `run` it, and `take` at the end of each interval."""

    def __init__(self, session: aiohttp.ClientSession, model: str) -> None:
        self._session = session
        self._model = model
        self._stream = _Watch()
        self._request = _Watch()
        self._errors: list[str] = []

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[Canary]:
        tasks = [asyncio.create_task(self._forever(ask)) for ask in (self._ask_for_stream, self._ask_for_token)]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def take(self) -> Waits:
        """Return the waits since the last call."""
        errors, self._errors = tuple(self._errors), []
        return Waits(self._stream.take(), self._request.take(), errors)

    async def _forever(self, ask: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await ask()
            except (aiohttp.ClientError, TimeoutError, RuntimeError) as error:
                self._errors.append(f"{type(error).__name__}: {error}"[:200])
                await asyncio.sleep(0.5)

    async def _ask_for_stream(self) -> None:
        body = {"model": self._model, "prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True}
        async with self._post(body | {"stream": True, "temperature": 0.8}) as response:
            self._stream.last_s = time.monotonic()
            async for line in response.content:
                if line.startswith(b'data: {"error"'):
                    raise RuntimeError(line.decode())
                if line.startswith(b"data: "):
                    self._stream.came()

    async def _ask_for_token(self) -> None:
        self._request.last_s = time.monotonic()
        async with self._post({"model": self._model, "prompt": "Hello", "max_tokens": 1}) as response:
            await response.read()
        self._request.came()
        await asyncio.sleep(0.05)
        self._request.last_s = time.monotonic()

    @contextlib.asynccontextmanager
    async def _post(self, body: dict[str, object]) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=REQUEST_LIMIT_S)
        async with self._session.post("/v1/completions", json=body, timeout=timeout) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {await response.text()}")
            yield response
