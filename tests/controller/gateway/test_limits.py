"""Bodies too large or too slow, too many requests at a time, readers that do not read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

BODY = {"model": "tiny", "prompt": "hello"}


async def test_a_declared_length_over_the_limit_is_refused_unread(new_fleet: Any) -> None:
    fleet = await new_fleet(max_body_bytes=1000)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(fleet.url.rpartition(":")[2]))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 10000000000\r\n\r\n"
    )
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 5)
    assert answer.startswith(b"HTTP/1.1 413 ")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "body_too_large"
    assert "1000 bytes" in error["message"]
    writer.close()
    await writer.wait_closed()


async def test_a_body_without_a_length_is_cut_at_the_limit(new_fleet: Any) -> None:
    fleet = await new_fleet(max_body_bytes=1000)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b" " * 100

    async with fleet.http.post(
        "/v1/completions", data=body(), headers={"Content-Type": "application/json"}
    ) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "body_too_large"


async def test_a_body_that_does_not_arrive_is_not_waited_for(new_fleet: Any) -> None:
    fleet = await new_fleet(body_timeout_s=0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(fleet.url.rpartition(":")[2]))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 5)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"did not arrive" in answer
    writer.close()
    await writer.wait_closed()


async def test_requests_beyond_the_bound_get_429_and_when_to_come_back(new_fleet: Any) -> None:
    fleet = await new_fleet(max_in_flight=1)
    fleet.worker.permits = 0
    first = asyncio.create_task(fleet.post("/v1/completions", BODY))
    await fleet.until(lambda: fleet.worker.running)
    async with fleet.http.post("/v1/completions", json=BODY) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "1"
        assert (await response.json())["error"]["code"] == "queue_full"
    fleet.worker.permits = None
    assert (await first)[0] == 200
    assert (await fleet.post("/v1/completions", BODY))[0] == 200


async def test_a_request_over_its_time_gets_504(new_fleet: Any) -> None:
    fleet = await new_fleet(request_timeout_s=0.05)
    fleet.worker.permits = 0
    status, answer = await fleet.post("/v1/completions", BODY)
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    await fleet.until(lambda: fleet.worker.cancels == [1])


async def test_a_client_that_does_not_read_loses_its_request_and_holds_up_nobody(new_fleet: Any) -> None:
    fleet = await new_fleet(max_queued_tokens=20, write_timeout_s=0.3)
    fleet.controller.table.base.max_model_len = 1_000_000
    fleet.controller.publish()
    await fleet.until(lambda: fleet.state.table.max_model_len == 1_000_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(fleet.url.rpartition(":")[2]), limit=1024)
    body = json.dumps(BODY | {"stream": True, "max_tokens": 500_000, "logprobs": 20}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
    )
    await fleet.until(lambda: fleet.worker.cancels == [1], 60)
    assert (await fleet.post("/v1/completions", BODY))[0] == 200
    await fleet.until(lambda: fleet.state.intake.num_in_flight == 0)
    writer.close()
    del reader
