"""Server-sent events: one answer as a stream of chunks.

Owns: the headers, the frames, failures in mid-stream. Leaves to others: a chunk's content (completions.py, chat.py),
deltas (streams/generation.py).

A successful stream ends with ``data: [DONE]``. A failed one ends with ``data: {"error": ...}`` and nothing after it:
OpenAI's clients raise on that. While there is nothing to send, comments keep proxies and clients from giving up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from lorafleet.controller.gateway.api import null_fields
from lorafleet.controller.gateway.api.errors import error_json, named_error
from lorafleet.controller.gateway.api.null_fields import with_nulls
from lorafleet.controller.gateway.api.usage import usage_of
from lorafleet.controller.gateway.streams.generation import ChoiceDelta, Generation

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
PATIENCE_S: Final = 0.5  # time for an error before the first token to get its own HTTP status
PING_S: Final = 3.0  # of silence, after which a comment is sent
PING: Final = b": ping\n\n"
_SLICE_BYTES = 1 << 16  # of one answer, written before others get their turn on the event loop
_NO_USAGE = b'"usage":null}\n\n'  # the end of a chunk, in a stream whose last chunk has the usage

_NOTHING: Mapping[str, object] = {}

_json = msgspec.json.Encoder().encode


class Frames(Protocol):
    """One endpoint's chunks, framed."""

    def opening(self) -> Iterable[bytes]:
        """Yield what precedes the first tokens, in pieces."""

    def delta(self, delta: ChoiceDelta) -> bytes:
        """Return a chunk with one choice's new tokens."""

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the chunk with the usage and no choices."""


class ChunkTemplate:
    """Chunks of one answer, whose constant parts are built once, so that a token costs one small JSON string.

    head: fields of every chunk. before, after: the JSON around the text within a choice.
    """

    def __init__(self, head: dict[str, Any], num_choices: int, before: bytes, after: bytes, *, has_usage: bool) -> None:
        self._head = head = with_nulls(head, null_fields.CHUNK)
        opening = b"data: " + _json(head)[:-1] + b',"choices":['
        self._choices = [opening + b'{"index":%d,' % index for index in range(num_choices)]
        self._texts = [choice + before for choice in self._choices]
        self._after = after
        self._tail = b"}]," + _NO_USAGE if has_usage else b"}]}\n\n"
        nulls = _json(dict.fromkeys(("logprobs", "finish_reason", *null_fields.CHUNK_CHOICE)))
        self._plain = after + b"," + nulls[1:-1] + self._tail

    def text(self, index: int, text: str) -> bytes:
        """Return a chunk with only text, the common one."""
        return self._texts[index] + _json(text) + self._plain

    def full(self, delta: ChoiceDelta, logprobs: object, more: Mapping[str, object] = _NOTHING) -> bytes:
        """Return a chunk with log-probabilities, or a finish reason, or both. more: other fields of the choice."""
        fields = {"logprobs": logprobs, "finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        rest = _json(with_nulls({**fields, **more}, null_fields.CHUNK_CHOICE))[1:-1]
        return b"".join((self._texts[delta.index], _json(delta.text), self._after, b",", rest, self._tail))

    def choice(self, index: int, fields: dict[str, Any]) -> bytes:
        """Return a chunk of one choice with any fields."""
        return self._choices[index] + _json(with_nulls(fields, null_fields.CHUNK_CHOICE))[1:-1] + self._tail

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the chunk after all choices."""
        return b"data: " + _json(self._head | {"choices": [], "usage": usage}) + b"\n\n"


def with_usage(chunks: bytes, usage: dict[str, Any]) -> bytes:
    """Return chunks of a template that has usage with the usage so far."""
    return chunks.replace(_NO_USAGE, b'"usage":' + _json(usage) + b"}\n\n")  # JSON's strings have no line ends


class EventStream:
    """The answer's body. A client that does not read it is disconnected (gateway/connections.py)."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=_HEADERS)
        self._clock = asyncio.get_running_loop().time
        self._last_at = self._clock()
        self._is_writing = False

    async def open(self) -> None:
        """Send the headers (with the first write)."""
        await self._response.prepare(self._request)

    async def write(self, data: bytes) -> None:
        """Write data after the client has read the previous data. Raises ConnectionResetError if it disconnected."""
        if self._request.transport is None:
            raise ConnectionResetError("the client has disconnected")
        self._is_writing = True
        try:
            await self._response.write(data)
        finally:
            self._is_writing = False
            self._last_at = self._clock()

    @contextlib.asynccontextmanager
    async def pinging(self) -> AsyncIterator[None]:
        """Send a comment whenever nothing else has been sent for a while."""
        task = asyncio.create_task(self._ping(), name="ping")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _ping(self) -> None:
        while True:
            wait_s = self._last_at + PING_S - self._clock()
            if wait_s > 0 or self._is_writing:
                await asyncio.sleep(max(wait_s, PING_S / 2))
            else:
                await self.write(PING)

    async def close(self) -> web.StreamResponse:
        """End the body."""
        await self._response.write_eof()
        return self._response


async def stream_answer(
    request: web.Request, generation: Generation, frames: Frames, *, has_usage: bool, is_usage_continuous: bool = False
) -> web.StreamResponse:
    """Send a generation as it arrives.

    An error before its first token is raised, so that it gets its own HTTP status, unless the prompt takes long: then
    the headers are sent while a worker computes it. is_usage_continuous: every chunk has the usage so far.
    """
    first = asyncio.create_task(generation.next(), name="first tokens")
    try:
        while not first.done():
            await asyncio.wait((first,), timeout=PATIENCE_S)
            if generation.has_worker:
                break
        if first.done():
            first.result()
        stream = EventStream(request)
        await stream.open()
        if not first.done():
            await stream.write(PING)  # with which the headers go out
        async with stream.pinging():
            await stream.write(
                await _send(
                    stream,
                    request,
                    generation,
                    first,
                    frames,
                    has_usage=has_usage,
                    is_usage_continuous=is_usage_continuous,
                )
            )
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    return await stream.close()


async def _send(
    stream: EventStream,
    request: web.Request,
    generation: Generation,
    first: asyncio.Task[list[ChoiceDelta]],
    frames: Frames,
    *,
    has_usage: bool,
    is_usage_continuous: bool,
) -> bytes:
    """Send all deltas. Return the end of the stream, which says that it is complete, or why it is not."""
    pieces = frames.opening()
    data = b""
    try:
        deltas = await first
        while deltas:
            for piece in itertools.chain(pieces, map(frames.delta, deltas)):
                data += with_usage(piece, usage_of(generation)) if is_usage_continuous else piece
                if len(data) > _SLICE_BYTES:
                    await stream.write(data)
                    data = b""
                    await asyncio.sleep(0)
            if data:
                await stream.write(data)
                data = b""
            pieces = ()
            deltas = await generation.next()
        if has_usage:
            data = frames.usage(usage_of(generation))
        return data + b"data: [DONE]\n\n"
    except ConnectionError:
        raise
    except Exception as error:
        return b"data: " + error_json(named_error(error, request)) + b"\n\n"
