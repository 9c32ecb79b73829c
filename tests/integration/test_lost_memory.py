"""Loads, replacements and unloads last whatever is killed, while one process that knows them lives."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from adapter_server import NUM_OUTPUT, PROMPT, Fleet
from serving import start, wait_until

from lorafleet.controller.fleet.retirement import GRACE_S


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Start two workers; replace one adapter of the start-up, unload one, and load another one."""
    root = tmp_path_factory.mktemp("memory")
    model = tiny.make_model("smollm2", root / "model")
    tiny.save_tokenizer(root / "model")
    expected = {"tiny": tiny.greedy(model, PROMPT, NUM_OUTPUT)}
    for seed, name in enumerate(("start", "one", "two")):
        adapted = tiny.make_adapter(copy.deepcopy(model), root / "adapters" / name, seed=seed + 1, strength=0.3)
        expected[name] = tiny.greedy(adapted, PROMPT, NUM_OUTPUT)
    arguments = ["--served-model-name", "tiny", "--dtype", "float32", "--enable-lora", "--num-workers", "2"]
    arguments += ["--allow-runtime-lora-updates", "--lora-root", str(root / "adapters"), "--lora-modules"]
    arguments += [f"{name}={root / 'adapters' / 'start'}" for name in ("replaced", "unloaded")]
    server = start(str(root / "model"), *arguments)
    fleet = Fleet(server, root, expected)
    try:
        server.wait_until_ready()
        assert fleet.post("/v1/load_lora_adapter", {"lora_name": "loaded", "lora_path": "one"})[0] == 200
        assert fleet.load("replaced", "two", load_inplace=True)[0] == 200
        assert fleet.unload("unloaded")[0] == 200
        yield fleet
    finally:
        server.stop()


def kill(fleet: Fleet, *names: bytes, num_workers: int = 2) -> None:
    victims = [pid for name in names for pid in sorted(fleet.server.processes(name))]
    workers = sorted(fleet.server.processes(b"ray::WorkerActor"))
    for pid in [pid for pid in victims if pid not in workers] + workers[:num_workers]:
        os.kill(pid, signal.SIGKILL)


def kill_busiest_worker(fleet: Fleet) -> None:
    """Kill the worker with the requests: the other one may have none."""

    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    before = {pid: ticks(pid) for pid in fleet.server.processes(b"ray::WorkerActor")}
    time.sleep(0.3)
    os.kill(max(before, key=lambda pid: ticks(pid) - before[pid]), signal.SIGKILL)


def workers(fleet: Fleet) -> list[dict[str, object]]:
    status, body = fleet.server.get("/fleet")
    return list(json.loads(body)["workers"]) if status == 200 else []


def num_lacking(fleet: Fleet) -> list[int]:
    """Return how many adapters each worker lacks, in ascending order."""
    return sorted(len(worker["lacking"]) for worker in workers(fleet))  # type: ignore[arg-type]


def texts(answer: tuple[int, str]) -> list[str]:
    status, body = answer
    assert status == 200, body
    return [choice["text"] for choice in json.loads(body)["choices"]]


def heal(fleet: Fleet, killed_at: float) -> None:
    def is_whole() -> bool:
        states = workers(fleet)
        return bool(states) and all(worker["state"] == "ready" for worker in states)

    try:
        wait_until(lambda: time.monotonic() > killed_at + 3.0 and is_whole(), "both workers are back", 120)
    except AssertionError as late:
        raise AssertionError(f"{late}\n{workers(fleet)}\n{fleet.server.output[-5000:]}") from None


def all_is_as_it_was(fleet: Fleet) -> None:
    for _ in range(6):  # whichever worker answers
        assert fleet.models() == ["tiny", "loaded", "replaced"]
        assert fleet.answers_as("loaded", "one")
        assert fleet.answers_as("replaced", "two")
        assert fleet.complete("unloaded")[0] == 404


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_the_controller_is_killed_with_some_or_all_workers(fleet: Fleet, num_workers: int) -> None:
    """It learns everything from the gateway if all are killed."""
    all_is_as_it_was(fleet)
    kill(fleet, b"ray::ControllerActor", num_workers=num_workers)
    heal(fleet, time.monotonic())
    all_is_as_it_was(fleet)


def test_requests_on_a_replaced_version_outlive_their_worker(fleet: Fleet) -> None:
    """The other worker keeps it though it has no request for it."""
    all_is_as_it_was(fleet)
    assert fleet.load("changing", "one")[0] == 200
    body = {"model": "changing", "prompt": [PROMPT] * 100, "max_tokens": 240, "temperature": 0, "ignore_eos": True}
    undisturbed = texts(fleet.post("/v1/completions", body))
    answers: list[tuple[int, str]] = []
    running = threading.Thread(target=lambda: answers.append(fleet.post("/v1/completions", body | {"n": 16})))
    running.start()
    wait_until(lambda: fleet.server.metric("vllm:num_requests_running") > 0, "the request runs")
    assert fleet.load("changing", "two", load_inplace=True)[0] == 200
    time.sleep(GRACE_S + 1.0)  # a worker without requests for the old version would have dropped it by now
    before = fleet.server.metric("lorafleet_choices_resumed_total")
    kill_busiest_worker(fleet)
    running.join(120)
    assert texts(answers[0]) == [text for text in undisturbed for _ in range(16)]
    assert fleet.server.metric("lorafleet_choices_resumed_total") > before
    assert fleet.answers_as("changing", "two")
    heal(fleet, time.monotonic())
    assert fleet.unload("changing")[0] == 200


def test_an_adapter_whose_files_are_gone_is_served_where_it_is_named_and_tried_again(fleet: Fleet) -> None:
    there, away = fleet.root / "adapters" / "one", fleet.root / "away"
    there.rename(away)
    kill(fleet, num_workers=1)
    heal(fleet, time.monotonic())
    wait_until(lambda: num_lacking(fleet) == [0, 1], "the new worker has tried to load it", 120)
    wait_until(lambda: fleet.complete("loaded")[0] == 200, "the gateway knows which one lacks it")
    for _ in range(10):
        assert fleet.answers_as("loaded", "one"), "all requests go to the worker that has it"
    kill(fleet, num_workers=2)
    heal(fleet, time.monotonic())
    wait_until(lambda: num_lacking(fleet) == [1, 1], "both have tried to load it", 120)
    wait_until(lambda: fleet.complete("loaded")[0] == 503, "the gateway knows that both lack it")
    assert json.loads(fleet.complete("loaded")[1])["error"]["code"] == "adapter_unavailable"
    cards = {card["id"]: card for card in json.loads(fleet.server.get("/v1/models")[1])["data"]}
    assert cards["loaded"]["unavailable"] and "unavailable" not in cards["replaced"]
    assert fleet.answers_as("replaced", "two") and fleet.answers_as("tiny", "tiny")
    Path(away).rename(there)
    wait_until(lambda: fleet.complete("loaded")[0] == 200, "it is tried again", 90)
    assert fleet.answers_as("loaded", "one")
