"""Server-sent events: one answer as a stream of chunks.

Owns: the headers, the frames, failures in mid-stream. Leaves to others: a chunk's content (completions.py, chat.py),
deltas (streams/generation.py).

A successful stream ends with ``data: [DONE]``. A failed one ends with ``data: {"error": ...}`` and nothing after it:
OpenAI's clients raise on that.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import msgspec
from aiohttp import web

from lorafleet.controller.gateway.api.errors import REQUEST_ID, error_json, named_error
from lorafleet.controller.gateway.api.usage import usage_of
from lorafleet.controller.gateway.streams.generation import ChoiceDelta, Generation

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_SLICE_BYTES = 1 << 16  # of one answer, written before others get their turn on the event loop
_NO_USAGE = b'"usage":null}\n\n'  # the end of a chunk, in a stream whose last chunk has the usage
_LARGE_BYTES = 1 << 15  # a write this large may have to wait by itself

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
        self._head = head
        opening = b"data: " + _json(head)[:-1] + b',"choices":['
        self._choices = [opening + b'{"index":%d,' % index for index in range(num_choices)]
        self._texts = [choice + before for choice in self._choices]
        self._after = after
        self._tail = b"}]," + _NO_USAGE if has_usage else b"}]}\n\n"
        self._plain = after + b',"logprobs":null,"finish_reason":null' + self._tail

    def text(self, index: int, text: str) -> bytes:
        """Return a chunk with only text, the common one."""
        return self._texts[index] + _json(text) + self._plain

    def full(self, delta: ChoiceDelta, logprobs: object, more: Mapping[str, object] = _NOTHING) -> bytes:
        """Return a chunk with log-probabilities, or a finish reason, or both. more: other fields of the choice."""
        parts = [
            self._texts[delta.index],
            _json(delta.text),
            self._after,
            b',"logprobs":',
            _json(logprobs),
            b',"finish_reason":',
            _json(delta.finish_reason),
        ]
        if delta.finish_reason is not None:
            parts += (b',"stop_reason":', _json(delta.stop_reason))
        if more:
            parts += (b",", _json(more)[1:-1])
        return b"".join([*parts, self._tail])

    def choice(self, index: int, fields: dict[str, Any]) -> bytes:
        """Return a chunk of one choice with any fields."""
        return self._choices[index] + _json(fields)[1:-1] + self._tail

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the chunk after all choices."""
        return b"data: " + _json(self._head | {"choices": [], "usage": usage}) + b"\n\n"


def with_usage(frame: bytes, usage: dict[str, Any]) -> bytes:
    """Return a chunk of a template that has usage with the usage so far."""
    assert frame.endswith(_NO_USAGE)
    return frame[: -len(_NO_USAGE)] + b'"usage":' + _json(usage) + b"}\n\n"


class EventStream:
    """The answer's body. A client that does not read it is disconnected (gateway/connections.py)."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=_HEADERS | {"x-request-id": request[REQUEST_ID]})

    async def open(self) -> None:
        """Send the headers (with the first write)."""
        await self._response.prepare(self._request)

    async def write(self, data: bytes) -> None:
        """Write data after the client has read the previous data. Raises ConnectionResetError if it disconnected."""
        if self._request.transport is None:
            raise ConnectionResetError("the client has disconnected")
        await self._response.write(data)

    async def close(self) -> web.StreamResponse:
        """End the body."""
        await self._response.write_eof()
        return self._response


async def stream_answer(
    request: web.Request, generation: Generation, frames: Frames, *, has_usage: bool, is_usage_continuous: bool = False
) -> web.StreamResponse:
    """Send a generation as it arrives. An error before its first token is raised, so it gets its own HTTP status.

    is_usage_continuous: every chunk has the usage so far.
    """
    deltas = await generation.next()
    stream = EventStream(request)
    await stream.open()
    pieces = frames.opening()
    data = b""
    try:
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
        data += b"data: [DONE]\n\n"
    except ConnectionError:
        raise
    except Exception as error:
        data = b"data: " + error_json(named_error(error, request)) + b"\n\n"
    await stream.write(data)
    return await stream.close()
