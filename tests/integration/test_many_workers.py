"""Two workers and two gateways on one port: no client notices a death, hang or restart, and the fleet recovers."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from openai_streams import PROMPTS, Answer, streams
from serving import Server, start, wait_until


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    server = start(
        str(tiny_model),
        *("--served-model-name", "tiny", "--dtype", "float32", "--num-workers", "2", "--gateway-processes", "2"),
        *("--enable-lora", "--lora-modules", f"good={tiny_model.parent / 'good'}"),
    )
    try:
        server.wait_until_ready()
        yield server
        assert server.stop() == 0, server.output
        wait_until(lambda: not server.survivors(), "nothing is left")
    finally:
        server.stop()


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[Answer]:
    return streams(server, lambda: None)


@pytest.fixture(scope="module")
def texts(server: Server) -> dict[str, list[str]]:
    return {model: [server.complete(model, [prompt])[0] for prompt in PROMPTS] for model in ("tiny", "good")}


def answers_as_before(server: Server, texts: dict[str, list[str]]) -> bool:
    return all(server.complete(model, PROMPTS) == expected for model, expected in texts.items())


def workers(server: Server) -> set[int]:
    return server.processes(b"ray::WorkerActor")


def gateways(server: Server) -> set[int]:
    return server.processes(b"lorafleet.controller.gateway")


def controller(server: Server) -> set[int]:
    return server.processes(b"ray::ControllerActor")


def num_in_table(server: Server) -> int:
    return len(server.series("lorafleet_worker_requests_running"))


def heal(server: Server) -> None:
    """Wait until all gateways know two workers; each is asked several times."""
    wait_until(lambda: all(num_in_table(server) == 2 for _ in range(6)), "the table has both", timeout_s=120)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_dies(server: Server, undisturbed: list[Answer], texts: dict[str, list[str]], number: int) -> None:
    heal(server)
    before = workers(server)
    assert len(before) == 2
    for victim in sorted(before):  # one after the other, since all streams may be with one of them
        assert streams(server, partial(os.kill, victim, number)) == undisturbed
        assert answers_as_before(server, texts)
        heal(server)
    wait_until(lambda: sum(server.series("lorafleet_choices_resumed_total")) > 0, "a gateway has moved streams")
    wait_until(lambda: len(workers(server) - before) == 2, "both are in new processes")
    assert answers_as_before(server, texts)


def test_a_worker_hangs(server: Server, undisturbed: list[Answer], texts: dict[str, list[str]]) -> None:
    heal(server)
    for hung in sorted(workers(server)):
        assert streams(server, partial(os.kill, hung, signal.SIGSTOP)) == undisturbed
        assert answers_as_before(server, texts)
        wait_until(partial(has_ended, hung), "it is ended", timeout_s=60)
        heal(server)
        assert answers_as_before(server, texts)


def test_all_workers_die(server: Server, undisturbed: list[Answer], texts: dict[str, list[str]]) -> None:
    heal(server)

    def fault() -> None:
        for pid in workers(server):
            os.kill(pid, signal.SIGKILL)

    assert streams(server, fault) == undisturbed
    fault()
    assert answers_as_before(server, texts), "requests wait for a worker"
    heal(server)


def test_the_controller_dies(server: Server, undisturbed: list[Answer], texts: dict[str, list[str]]) -> None:
    heal(server)
    before, (first,) = workers(server), controller(server)
    assert streams(server, lambda: os.kill(first, signal.SIGKILL)) == undisturbed
    assert answers_as_before(server, texts)
    wait_until(lambda: bool(controller(server) - {first}), "Ray starts it again", timeout_s=60)
    wait_until(lambda: status(server).count(" ready ") == 2, "it has found the workers", timeout_s=60)
    heal(server)
    assert workers(server) == before, "they went on"
    assert answers_as_before(server, texts)


def test_a_gateway_dies(server: Server, texts: dict[str, list[str]]) -> None:
    heal(server)
    first = gateways(server)
    assert len(first) == 2
    os.kill(min(first), signal.SIGKILL)
    wait_until(partial(has_ended, min(first)), "the gateway is gone, its sockets too")
    assert all(answers_as_before(server, texts) for _ in range(3))
    wait_until(lambda: len(gateways(server)) == 2, "another one takes its place")


def test_a_rolling_restart_under_load_loses_no_request(server: Server, texts: dict[str, list[str]]) -> None:
    heal(server)
    before, stop = workers(server), threading.Event()

    def ask(model: str) -> int:
        num_answers = 0
        while not stop.is_set():
            assert server.complete(model, PROMPTS) == texts[model]
            num_answers += 1
        return num_answers

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask, model) for model in ("tiny", "good") * 2]
        try:
            server.process.send_signal(signal.SIGUSR1)
            wait_until(lambda: "all 2 workers were restarted" in server.output, "both are restarted", timeout_s=180)
        finally:
            stop.set()
        assert all(client.result() > 0 for client in clients)
    assert not workers(server) & before
    heal(server)


def test_the_status_shows_every_worker(server: Server) -> None:
    heal(server)
    lines = status(server).splitlines()
    assert lines[0].split()[:4] == ["WORKER", "STATE", "RANKS", "GENERATION"]
    assert [line.split()[:3] for line in lines[1:3]] == [[f"lorafleet-worker-{n}", "ready", "1"] for n in range(2)]
    assert lines[4].split() == ["MODEL", "TIER", "REQUESTS", "TOKENS/S", "TOKENS"]
    assert lines[-1].startswith("1 adapters, ")


def status(server: Server) -> str:
    """Return the output of `lorafleet status`; empty while the controller is down."""
    command = [str(Path(sys.executable).parent / "lorafleet"), "status", "--url", server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout


def has_ended(pid: int) -> bool:
    """Return whether all its threads have ended: command line and first thread vanish before the sockets."""
    try:
        is_over = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        return is_over and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    except OSError:
        return True
