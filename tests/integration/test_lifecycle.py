"""Ends and deaths: a drain finishes running requests, no process remains, a killed worker restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server, start, wait_until


@pytest.fixture
def server(tiny_model: Path) -> Iterator[Server]:
    server = start(
        str(tiny_model),
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
        "--enable-lora",
        "--lora-modules",
        f"good={tiny_model.parent / 'good'}",
    )
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def complete(server: Server, **options: object) -> tuple[int, dict[str, object]]:
    body = {"model": "good", "prompt": "the", "max_tokens": 8, "temperature": 0, "ignore_eos": True} | options
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class Background(threading.Thread):
    """A request in progress."""

    def __init__(self, server: Server, **options: object) -> None:
        super().__init__(daemon=True)
        self._server, self._options = server, options
        self.result: tuple[int, dict[str, object]] | None = None
        self.start()

    def run(self) -> None:
        self.result = complete(self._server, **self._options)


def worker_pid(server: Server) -> int:
    for pid in server.children():
        if b"WorkerActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("no worker process")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_leaves_no_process(server: Server, number: int) -> None:
    assert complete(server)[0] == 200
    running = Background(server, prompt=["the"] * 8, max_tokens=250, n=16)  # some seconds
    wait_until(lambda: server.metric("vllm:num_requests_running") > 0, "the request runs")
    assert server.children(), "the server has processes to leave behind"
    assert server.stop(number) == 0, server.output
    running.join(10)
    assert running.result is not None and running.result[0] == 200, "what ran was finished"
    assert not server.survivors()
    assert "Traceback" not in server.output


def test_a_killed_worker_restarts_and_resumes_its_requests(server: Server) -> None:
    long: dict[str, object] = {"prompt": ["the", "quick", "brown", "fox"] * 4, "max_tokens": 250, "n": 16}
    long |= {"temperature": 1, "seed": 3}
    _, expected = complete(server, **long)
    _, before = complete(server)
    running = Background(server, **long)
    wait_until(lambda: server.metric("vllm:num_requests_running") > 0, "the request runs")
    os.kill(worker_pid(server), signal.SIGKILL)
    wait_until(lambda: server.get("/ready")[0] == 503, "the worker is away")
    wait_until(lambda: server.get("/ready")[0] == 200, "the worker is back", 60)
    running.join(60)
    assert running.result is not None
    status, answer = running.result
    assert status == 200 and answer["choices"] == expected["choices"]
    assert server.metric("lorafleet_choices_resumed_total") > 0
    status, after = complete(server)
    assert status == 200
    assert after["choices"] == before["choices"]
    assert server.get("/health")[0] == 200


def test_a_killed_serve_takes_gateway_and_worker_with_it(server: Server) -> None:
    def serving() -> set[str]:
        names = {Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in server.survivors()}
        # Ray's two monitoring agents check their parent rarely, and so end some time later.
        return {name for name in names if "Agent" not in name}

    server.children()
    assert any("gateway" in name for name in serving())
    server.process.kill()
    wait_until(lambda: not serving(), "all that serves has ended", 30)


def test_curl_as_the_server_prints_it(server: Server) -> None:
    commands = [line.strip() for line in server.lines if line.startswith("curl ")]
    assert len(commands) == 3
    for command in commands:
        result = subprocess.run(
            ["bash", "-c", f"{command} --fail --silent"], capture_output=True, timeout=60, check=False
        )
        assert result.returncode == 0, (command, result.stdout)
        assert json.loads(result.stdout)["object"] in ("list", "chat.completion")


def test_an_api_key_is_asked_for(tiny_model: Path) -> None:
    server = start(str(tiny_model), "--served-model-name", "tiny", environment={"LORAFLEET_API_KEY": "one,two"})
    try:
        server.wait_until_ready()
        assert server.get("/v1/models")[0] == 401
        assert server.get("/health")[0] == 200
        request = urllib.request.Request(f"{server.url}/v1/models", headers={"Authorization": "Bearer two"})
        with urllib.request.urlopen(request, timeout=10) as response:
            assert response.status == 200
    finally:
        server.stop()
