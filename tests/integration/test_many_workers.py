"""Two workers behind two gateways on one port: no client notices the death of a worker, and what dies is replaced."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
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


Answer = dict[int, tuple[str, list[str], str]]


def streams(server: Server, fault: Callable[[], None]) -> list[Answer]:
    """Eight at once, of the base model and an adapter; the fault comes when all have their first tokens."""
    begun = threading.Barrier(9)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(stream, server, ("tiny", "good")[number % 2], number, begun) for number in range(8)]
        begun.wait(timeout=60)
        fault()
        return [answer.result() for answer in answers]


def stream(server: Server, model: str, number: int, begun: threading.Barrier) -> Answer:
    """Of each choice: text, tokens as the log-probabilities name them, finish reason. Asks for all that has a state."""
    is_first = True
    texts, tokens, reasons = {0: "", 1: ""}, {0: list[str](), 1: list[str]()}, {0: "", 1: ""}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for chunk in client.completions.create(
            model=model,
            prompt=PROMPTS[number % len(PROMPTS)],
            max_tokens=220,
            n=2,
            seed=number,
            logprobs=2,
            stream=True,
            presence_penalty=0.5,
            frequency_penalty=0.3,
            stop=["no such text", "never said"],
            extra_body={"ignore_eos": True, "repetition_penalty": 1.1},
        ):
            if is_first:
                is_first = False
                begun.wait(timeout=60)
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                if choice.logprobs is not None:
                    tokens[choice.index] += choice.logprobs.tokens or []
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    return {index: (texts[index], tokens[index], reasons[index]) for index in texts}


def metric(server: Server, name: str) -> list[float]:
    """Its values, one for each set of labels, in the gateway that answers."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{")]


def loads(server: Server) -> list[float]:
    """How many requests each worker in the table runs."""
    return metric(server, "lorafleet_worker_requests_running")


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


def has_ended(pid: int) -> bool:
    """Its command line is gone earlier than its sockets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


def workers(server: Server) -> set[int]:
    return processes(server, b"ray::WorkerActor")


def gateways(server: Server) -> set[int]:
    return processes(server, b"lorafleet.controller.gateway")


def test_one_goes_on_while_the_other_is_replaced(server: Server) -> None:
    expected = {model: [server.complete(model, [prompt]) for prompt in PROMPTS] for model in ("tiny", "good")}
    undisturbed = streams(server, lambda: None)
    before = workers(server)
    assert len(before) == 2
    assert streams(server, lambda: os.kill(min(before), signal.SIGKILL)) == undisturbed
    wait_until(
        lambda: sum(metric(server, "lorafleet_choices_resumed_total")) > 0, "a gateway has moved streams to the other"
    )
    wait_until(lambda: len(loads(server)) == 1, "the table has one worker")
    for model, texts in expected.items():
        assert [server.complete(model, [prompt]) for prompt in PROMPTS] == texts
    wait_until(lambda: len(loads(server)) == 2, "the other is back", timeout_s=120)
    assert workers(server) - before, "in a new process"
    hung = min(workers(server))
    try:
        assert streams(server, lambda: os.kill(hung, signal.SIGSTOP)) == undisturbed
    finally:
        os.kill(hung, signal.SIGCONT)
    wait_until(lambda: len(loads(server)) == 2, "the table has both again", timeout_s=60)
    for model, texts in expected.items():
        assert [server.complete(model, [prompt]) for prompt in PROMPTS] == texts
    first = gateways(server)
    assert len(first) == 2
    os.kill(min(first), signal.SIGKILL)
    wait_until(lambda: has_ended(min(first)), "the gateway is gone, its sockets too")
    assert [server.complete("good", [prompt]) for prompt in PROMPTS * 3] == expected["good"] * 3
    wait_until(lambda: len(gateways(server)) == 2, "another gateway takes its place")
    server.stop()
    wait_until(lambda: not server.survivors(), "nothing is left")
