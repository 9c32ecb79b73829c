"""Two workers behind two gateways on one port: all take requests, the death of one of either kind leaves the other
serving, and a new one takes its place."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server, start, wait_until

PROMPTS = ["the quick", "over the lazy dog", "then", "brown fox"]


@pytest.fixture
def server(tiny_model: Path) -> Iterator[Server]:
    server = start(
        str(tiny_model),
        *("--served-model-name", "tiny", "--dtype", "float32", "--num-workers", "2", "--gateway-processes", "2"),
        *("--enable-lora", "--lora-modules", f"good={tiny_model.parent / 'good'}"),
    )
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def complete(server: Server, model: str, prompt: str = PROMPTS[0], max_tokens: int = 12) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = json.load(response)["choices"][0]["text"]
        return text


def loads(server: Server) -> list[float]:
    """How many requests each worker in the table runs."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("lorafleet_worker_requests_running{")]


def processes(server: Server, name: bytes) -> set[int]:
    """Those with a name in their command line."""
    pids = set()
    for pid in server.children():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if name in command:
            pids.add(pid)
    return pids


def workers(server: Server) -> set[int]:
    return processes(server, b"ray::WorkerActor")


def gateways(server: Server) -> set[int]:
    return processes(server, b"lorafleet.controller.gateway")


def test_one_goes_on_while_the_other_is_replaced(server: Server) -> None:
    expected = {model: [complete(server, model, prompt) for prompt in PROMPTS] for model in ("tiny", "good")}
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        running = [threads.submit(complete, server, "tiny", prompt, 200) for prompt in PROMPTS * 2]
        wait_until(lambda: len(loads(server)) == 2 and min(loads(server)) > 0, "both workers have requests")
        assert len({answer.result() for answer in running}) == len(PROMPTS), "the same answers from both"
    before = workers(server)
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    wait_until(lambda: len(loads(server)) == 1, "the table has one worker")
    for model, texts in expected.items():
        assert [complete(server, model, prompt) for prompt in PROMPTS] == texts
    wait_until(lambda: len(loads(server)) == 2, "the other is back", timeout_s=120)
    assert workers(server) - before, "in a new process"
    for model, texts in expected.items():
        assert [complete(server, model, prompt) for prompt in PROMPTS] == texts
    first = gateways(server)
    assert len(first) == 2
    os.kill(min(first), signal.SIGKILL)
    wait_until(lambda: min(first) not in gateways(server), "the gateway is gone")
    assert [complete(server, "good", prompt) for prompt in PROMPTS * 3] == expected["good"] * 3
    wait_until(lambda: len(gateways(server)) == 2, "another gateway takes its place")
    server.stop()
    wait_until(lambda: not server.survivors(), "nothing is left")
