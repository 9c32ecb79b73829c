"""Limits on requests: bodies too large or too slow, too many choices, shares of tenants, clients that do not read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lorafleet.controller.gateway.limits import Limits
from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.workers.errors import ConfigError

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


TENANTS = {"key-a": Tenant("a"), "key-b": Tenant("b")}
A, B = {"Authorization": "Bearer key-a"}, {"Authorization": "Bearer key-b"}


async def test_choices_over_the_limit_get_429_with_retry_after(new_fleet: Any) -> None:
    fleet = await new_fleet(max_in_flight=2)
    fleet.worker.permits = 0
    first = asyncio.create_task(fleet.post("/v1/completions", BODY | {"n": 2}))
    await fleet.until(lambda: fleet.worker.running)
    async with fleet.http.post("/v1/completions", json=BODY) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "1"
        error = (await response.json())["error"]
    assert error["code"] == "queue_full" and "--max-in-flight" in error["message"]
    status, answer = await fleet.post("/v1/completions", BODY | {"n": 3})
    assert (status, answer["error"]["param"]) == (400, "n"), "it would never fit"
    fleet.worker.permits = None
    assert (await first)[0] == 200
    assert (await fleet.post("/v1/completions", BODY))[0] == 200


@pytest.mark.parametrize(
    "flood",
    [BODY | {"n": 14}, {"model": "tiny", "prompt": ["a"] * 14}, {"model": "tiny", "prompt": ["a"] * 7, "n": 2}],
    ids=["n", "prompts", "both"],
)
async def test_one_tenants_choices_leave_others_a_share(new_fleet: Any, flood: dict[str, Any]) -> None:
    """16 choices at a time: a tenant alone may have 14, and gets none back while another wants more."""
    fleet = await new_fleet(max_in_flight=16, tenants=TENANTS, headers=A)
    fleet.worker.permits = 0
    many = asyncio.create_task(fleet.post("/v1/completions", flood, headers=A))
    await fleet.until(lambda: len(fleet.worker.running) == 14)
    assert (await fleet.post("/v1/completions", BODY, headers=A))[0] == 429
    small = asyncio.create_task(fleet.post("/v1/completions", BODY | {"n": 2}, headers=B))
    await fleet.until(lambda: len(fleet.worker.running) == 16)
    assert (await fleet.post("/v1/completions", BODY | {"n": 4}, headers=B))[0] == 429
    fleet.worker.permits = None
    assert [(await task)[0] for task in (many, small)] == [200, 200]
    assert fleet.state.intake.choices.num_taken == 0
    status, answer = await fleet.post("/v1/completions", BODY | {"n": 8}, headers=A)
    assert status == 429, "b was refused less than its share a moment ago"
    assert "share" in answer["error"]["message"]
    assert (await fleet.post("/v1/completions", BODY | {"n": 4}, headers=B))[0] == 200
    assert (await fleet.post("/v1/completions", BODY | {"n": 8}, headers=A))[0] == 200


async def test_bodies_that_arrive_slowly_hold_no_choices_and_leave_others_places(new_fleet: Any) -> None:
    fleet = await new_fleet(max_connections=32, max_in_flight=1, tenants=TENANTS, headers=A)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer key-a\r\nContent-Length: 1\r\n\r\n"
    )
    slow = []
    for _ in range(23):  # of 24 places for requests it may have 21
        reader, writer = await asyncio.open_connection("127.0.0.1", int(fleet.url.rpartition(":")[2]))
        writer.write(head)
        slow.append((reader, writer))
    answers = [asyncio.create_task(reader.readuntil(b"}}")) for reader, _ in slow]
    await fleet.until(lambda: sum(answer.done() for answer in answers) == 2)
    for answer in answers:
        if answer.done():
            assert answer.result().startswith(b"HTTP/1.1 429 ") and b"--max-connections" in answer.result()
    assert fleet.state.intake.requests.held("a") == 21
    assert (await fleet.post("/v1/completions", BODY, headers=B))[0] == 200
    for _, writer in slow:
        writer.close()
    await fleet.until(lambda: fleet.state.intake.num_in_flight == 0)
    await asyncio.gather(*answers, return_exceptions=True)


async def test_bytes_of_bodies_are_bounded_together_and_given_back(new_fleet: Any) -> None:
    fleet = await new_fleet(max_body_bytes=1000, max_buffered_bytes=2000, tenants=TENANTS, headers=A)
    fleet.worker.permits = 0
    large = BODY | {"user": "x" * 900}
    first = asyncio.create_task(fleet.post("/v1/completions", large, headers=A))
    await fleet.until(lambda: fleet.worker.running)
    status, answer = await fleet.post("/v1/completions", large, headers=A)
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    assert "--max-buffered-bytes" in answer["error"]["message"]
    second = asyncio.create_task(fleet.post("/v1/completions", BODY | {"user": "x" * 700}, headers=B))
    await fleet.until(lambda: len(fleet.worker.running) == 2)
    fleet.worker.permits = None
    assert [(await task)[0] for task in (first, second)] == [200, 200]
    await fleet.until(lambda: fleet.state.intake.bytes.num_taken == 0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", [b"{", b'{"model": "nothing", "prompt": "a"}', b'{"tokens": "a"}'])
async def test_whatever_becomes_of_a_request_it_holds_nothing_afterwards(fleet: Any, path: str, body: bytes) -> None:
    assert (await fleet.post(path, body))[0] in (400, 404)
    intake = fleet.state.intake
    assert (intake.num_in_flight, intake.requests.num_taken, intake.bytes.num_taken) == (0, 0, 0)
    assert intake.choices.num_taken == 0


async def test_a_broken_chunk_is_the_clients_mistake(fleet: Any) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(fleet.url.rpartition(":")[2]))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nnot a number\r\n"
    )
    assert (await asyncio.wait_for(reader.read(), 5)).split(b" ")[1] == b"400"
    writer.close()
    await fleet.until(lambda: fleet.state.intake.num_in_flight == 0)


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


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"max_connections": 0}, "--max-connections is 0"),
        ({"header_timeout_s": 0.0}, "--header-timeout-s is 0"),
        ({"write_timeout_s": float("inf")}, "--write-timeout-s is inf"),
        ({"body_timeout_s": float("nan")}, "--body-timeout-s is nan"),
        ({"max_body_bytes": 1000, "max_buffered_bytes": 1999}, "--max-buffered-bytes is 1999"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_by_its_flag(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        Limits(**fields)
