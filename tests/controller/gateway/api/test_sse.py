"""Streams: comments while there is nothing to send, and the status of early errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lorafleet.controller.gateway.api import sse
from lorafleet.proto import worker_pb2

STREAM = {"model": "tiny", "prompt": "hello world", "max_tokens": 4, "stream": True}
PING = b": ping\n\n"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PATIENCE_S", 0.02)
    monkeypatch.setattr(sse, "PING_S", 0.02)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("chat", [False, True])
async def test_a_stream_whose_prompt_takes_long_has_its_headers_at_once_and_then_comments(
    fleet: Any, chat: bool
) -> None:
    fleet.worker.permits = 0
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = STREAM if not chat else STREAM | {"messages": [{"role": "user", "content": "hello"}], "prompt": None}
    async with fleet.http.post(path, json=body) as response:
        assert response.status == 200
        for _ in range(4):
            assert await response.content.readuntil(b"\n\n") == PING
        fleet.worker.permits = None
        events = (await response.read()).split(b"\n\n")
    events = [event for event in events if event and event + b"\n\n" != PING]
    assert all(event.startswith(b"data: ") for event in events)
    assert len(events) >= 4
    assert events[-1] == b"data: [DONE]"


@pytest.mark.usefixtures("hasty")
async def test_a_pause_in_mid_stream_has_comments_too(fleet: Any) -> None:
    fleet.worker.permits = 2
    async with fleet.http.post("/v1/completions", json=STREAM) as response:
        while (event := await response.content.readuntil(b"\n\n")) == PING:
            pass
        assert event.startswith(b"data: ")
        while await response.content.readuntil(b"\n\n") != PING:
            pass
        fleet.worker.permits = None
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


@pytest.mark.usefixtures("hasty")
async def test_openais_client_skips_comments(fleet: Any) -> None:
    fleet.worker.permits = 0
    stream = await fleet.openai.completions.create(**STREAM)
    asyncio.get_running_loop().call_later(0.1, setattr, fleet.worker, "permits", None)
    texts = [chunk.choices[0].text async for chunk in stream]
    assert "".join(texts).startswith("hello world")


@pytest.mark.usefixtures("hasty")
async def test_an_error_after_the_headers_is_an_event(fleet: Any) -> None:
    fleet.worker.permits = 0
    async with fleet.http.post("/v1/completions", json=STREAM) as response:
        assert await response.content.readuntil(b"\n\n") == PING
        fleet.worker.error = worker_pb2.Ended(error_code="invalid_request", error_message="It is wrong.")
        fleet.worker.permits = None
        rest = await response.read()
    assert b'data: {"error":' in rest
    assert b"[DONE]" not in rest


@pytest.mark.usefixtures("hasty")
async def test_while_no_worker_takes_a_request_its_status_stays_open(fleet: Any) -> None:
    await fleet.worker.kill()
    await fleet.until(lambda: fleet.state.not_ready_reason == "no worker is ready")
    status, answer = await fleet.post("/v1/completions", STREAM)
    assert (status, answer["error"]["code"]) == (503, "no_worker")


@pytest.mark.usefixtures("hasty")
async def test_a_client_that_leaves_between_comments_cancels_its_request(fleet: Any) -> None:
    fleet.worker.permits = 0
    async with fleet.http.post("/v1/completions", json=STREAM) as response:
        assert await response.content.readuntil(b"\n\n") == PING
        response.close()
    await fleet.until(lambda: fleet.worker.cancels == [1])
    await fleet.until(lambda: fleet.state.intake.num_in_flight == 0)


async def test_a_quick_stream_has_none(fleet: Any) -> None:
    async with fleet.http.post("/v1/completions", json=STREAM) as response:
        assert PING not in await response.read()
