"""A line for each answer; an output that is not read holds nothing up."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lorafleet.controller.gateway.api import access_log as module
from lorafleet.controller.gateway.api.access_log import AccessLog
from lorafleet.controller.gateway.api.state import GatewayState
from lorafleet.controller.gateway.listener import Listener


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AccessLog]:
    """One that writes into the file `log`."""
    fd = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    ticks = iter(range(1000))
    log = AccessLog(fd, clock=lambda: next(ticks) / 4)
    yield log
    log.close()
    os.close(fd)


async def lines_of(log: AccessLog, tmp_path: Path, fleet: Any, *requests: tuple[str, str, dict[str, Any]]) -> list[str]:
    """Return the lines logged for these requests (method, path, more) to a gateway of the fleet."""
    state = GatewayState(replace(fleet.state.config))
    listener = Listener(state, log)
    await listener.set_up()
    url = f"http://127.0.0.1:{await listener.listen('127.0.0.1', 0)}"
    await fleet.until(lambda: state.not_ready_reason is None, 20)
    async with aiohttp.ClientSession() as http:
        for method, path, more in requests:
            async with http.request(method, url + path, **more) as response:
                await response.read()
    await listener.close()
    log.close()
    return (tmp_path / "log").read_text().splitlines()


async def test_each_answer_has_a_line_with_what_was_asked_and_how_it_ended(
    log: AccessLog, tmp_path: Path, fleet: Any
) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "stream": True}
    lines = await lines_of(
        log,
        tmp_path,
        fleet,
        ("POST", "/v1/completions?api_key=secret", {"json": body, "headers": {"x-request-id": "mine-1"}}),
        ("GET", "/v1/models/nothing", {"headers": {"x-request-id": "mine-2"}}),
        ("GET", "/v1/%0A2026%20forged", {"headers": {"x-request-id": "mine-3"}}),
    )
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in lines] == [
        '127.0.0.1 "POST /v1/completions" 200 in 0.250 s, request mine-1',
        '127.0.0.1 "GET /v1/models/nothing" 404 in 0.250 s, request mine-2',
        '127.0.0.1 "GET /v1/%0A2026%20forged" 404 in 0.250 s, request mine-3',
    ]


async def test_what_machines_ask_for_all_the_time_has_none(log: AccessLog, tmp_path: Path, fleet: Any) -> None:
    paths = ("/health", "/health/", "/ready", "/ping", "/metrics", "/fleet", "/version")
    asked: list[tuple[str, str, dict[str, Any]]] = [("GET", path, {}) for path in paths]
    (line,) = await lines_of(log, tmp_path, fleet, *asked)
    assert '"GET /version" 200' in line


def test_lines_that_nobody_reads_are_lost_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINES", 100)
    monkeypatch.setattr(module, "_END_S", 0.0)
    reader, writer = os.pipe()
    log = AccessLog(writer)
    for number in range(5000):  # more than the pipe and the queue hold
        log.add(f"line {number} {'x' * 200}")
    log.close()
    text = b""
    while b"lines were lost here" not in text:  # read now, the rest comes with how many are missing
        text += os.read(reader, 1 << 16)
    assert text.startswith(b"2") and b"line 0 x" in text
    log._thread.join(10)
    assert not log._thread.is_alive()
    os.close(reader)
    os.close(writer)


def test_a_reader_that_has_gone_ends_the_log_and_nothing_else() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    log = AccessLog(writer)
    log.add("line")
    log._thread.join(10)
    assert not log._thread.is_alive()
    log.add("another")
    log.close()
    os.close(writer)
