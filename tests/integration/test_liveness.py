"""Hung and lost processes: `serve` reports them, and recovers or ends with a reason; no request waits forever."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server, start, wait_until

RAYS_OWN_LOG = re.compile(r"^\[[^\]]* [IWEF] \d+ \d+\]|\(raylet\)|\(gcs_server\)|\.cc:\d+", re.MULTILINE)


def fleet(model: Path) -> Server:
    server = start(
        str(model),
        *("--served-model-name", "tiny", "--dtype", "float32", "--num-workers", "2", "--gateway-processes", "2"),
        *("--enable-lora", "--lora-modules", f"good={model.parent / 'good'}"),
        *("--allow-runtime-lora-updates", "--lora-root", str(model.parent)),
    )
    try:
        server.wait_until_ready()
    except BaseException:
        server.stop()
        raise
    return server


@pytest.fixture
def server(tiny_model: Path) -> Iterator[Server]:
    server = fleet(tiny_model)
    yield server
    server.stop()


def gateways(server: Server) -> set[int]:
    return server.processes(b"lorafleet.controller.gateway")


def load(server: Server, model: Path) -> tuple[int, float]:
    """Load an adapter. Return the status, and how long it took."""
    began = time.monotonic()
    body = {"lora_name": "again", "lora_path": str(model.parent / "good"), "load_inplace": True}
    request = urllib.request.Request(
        f"{server.url}/v1/load_lora_adapter", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, time.monotonic() - began
    except urllib.error.HTTPError as error:
        return error.code, time.monotonic() - began


def serves_again(server: Server, answer: list[str]) -> bool:
    try:
        return all(server.complete("again", ["the quick"]) == answer for _ in range(6))
    except urllib.error.HTTPError as error:
        assert error.code == 404, "the other gateway has not heard of it yet"
        return False


def connects(server: Server) -> bool:
    """Return whether a new connection is answered."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=2)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_a_gateway_and_a_controller_that_hang_are_replaced_and_a_clean_stop_says_nothing_of_ray(
    server: Server, tiny_model: Path
) -> None:
    answer = server.complete("good", ["the quick"])
    hung = min(gateways(server))
    os.kill(hung, signal.SIGSTOP)
    wait_until(lambda: "no sign of life" in server.output, "it is told", 60)
    wait_until(lambda: hung not in gateways(server) and len(gateways(server)) == 2, "it is replaced", 60)
    wait_until(lambda: all(connects(server) for _ in range(20)), "every new connection is answered", 60)
    assert server.complete("good", ["the quick"]) == answer

    (controller,) = server.processes(b"ray::ControllerActor")
    os.kill(controller, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        loads = list(pool.map(lambda _: load(server, tiny_model), range(4)))
    assert [status for status, _ in loads] == [503] * 4
    assert max(seconds for _, seconds in loads) < 30
    assert server.complete("good", ["the quick"]) == answer, "it is in nobody's way"
    wait_until(lambda: "the controller has not answered" in server.output, "it is told", 60)
    wait_until(lambda: "the controller was started again" in server.output, "it is mended", 120)
    wait_until(lambda: load(server, tiny_model)[0] == 200, "adapters are loaded again", 60)
    wait_until(lambda: serves_again(server, answer), "both gateways know of it", 30)

    num_lines = len(server.lines)
    assert server.stop() == 0, server.output
    said = "".join(server.lines[num_lines:])
    assert not RAYS_OWN_LOG.search(said), said
    assert said.splitlines()[-1] == "stopped"
    assert "WARNING" not in said and "ERROR" not in said, said
    wait_until(lambda: not server.survivors(), "nothing is left")


@pytest.mark.parametrize("process", ["raylet", "gcs_server"])
def test_without_one_of_rays_processes_serve_ends_with_a_reason(tiny_model: Path, process: str) -> None:
    server = fleet(tiny_model)
    try:
        (pid,) = {
            pid
            for pid in server.children()
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/" + process.encode())
        }
        os.kill(pid, signal.SIGKILL)
        assert server.process.wait(60) == 1, server.output
        last = server.output.splitlines()[-1]
        assert last == f"lorafleet: error: Ray has failed: its {process} ended with exit code -9."
    finally:
        server.stop()
    wait_until(lambda: not serving(server), "nothing that serves is left", 30)


def serving(server: Server) -> set[str]:
    """Return command lines of processes that outlive it, but for Ray's two agents, which check their parent rarely."""
    commands = set()
    for pid in server.survivors():
        with contextlib.suppress(OSError):
            commands.add(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
    return {command for command in commands if command and "Agent" not in command and "agent" not in command}
