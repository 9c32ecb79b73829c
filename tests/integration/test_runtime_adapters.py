"""Adapters are loaded and unloaded on a running server with vLLM's API; a worker's death loses none."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from adapter_server import NUM_OUTPUT, PROMPT, Fleet
from serving import start, wait_until


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    root = tmp_path_factory.mktemp("runtime")
    model = tiny.make_model("smollm2", root / "model")
    tiny.save_tokenizer(root / "model")
    expected = {"tiny": tiny.greedy(model, PROMPT, NUM_OUTPUT)}
    for seed, name in enumerate(("start", "one", "two")):
        adapted = tiny.make_adapter(copy.deepcopy(model), root / "adapters" / name, seed=seed + 1, strength=0.3)
        expected[name] = tiny.greedy(adapted, PROMPT, NUM_OUTPUT)
    assert len({tuple(ids) for ids in expected.values()}) == len(expected)
    tiny.make_adapter(copy.deepcopy(model), root / "adapters" / "large", rank=64)
    tiny.make_adapter(copy.deepcopy(model), root / "elsewhere")
    arguments = ["--served-model-name", "tiny", "--dtype", "float32", "--enable-lora", "--lora-root"]
    arguments += [str(root / "adapters"), "--lora-modules", f"start={root / 'adapters' / 'start'}"]
    server = start(str(root / "model"), *arguments, environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"})
    try:
        server.wait_until_ready()
        yield Fleet(server, root, expected)
    finally:
        server.stop()


def test_an_adapter_is_loaded_replaced_in_place_and_unloaded(fleet: Fleet) -> None:
    assert fleet.complete("new")[0] == 404
    assert fleet.load("new", "one") == (200, "Success: LoRA adapter 'new' added successfully.")
    assert fleet.models() == ["tiny", "new", "start"]
    assert fleet.answers_as("new", "one")
    assert fleet.load("new", "two")[0] == 409
    assert fleet.answers_as("new", "one")
    assert fleet.load("new", "two", load_inplace=True)[0] == 200
    assert fleet.answers_as("new", "two")
    assert fleet.unload("new") == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert fleet.complete("new")[0] == fleet.unload("new")[0] == 404
    assert fleet.answers_as("start", "start") and fleet.answers_as("tiny", "tiny")


def test_a_file_that_changed_under_its_name_is_the_new_adapter_after_a_reload(fleet: Fleet) -> None:
    moving = fleet.root / "adapters" / "moving"
    shutil.copytree(fleet.root / "adapters" / "one", moving)
    assert fleet.load("moving", "moving")[0] == 200
    assert fleet.answers_as("moving", "one")
    shutil.copy(fleet.root / "adapters" / "two" / "adapter_model.safetensors", moving)
    assert fleet.load("moving", "moving", load_inplace=True)[0] == 200
    assert fleet.answers_as("moving", "two")
    assert fleet.unload("moving")[0] == 200


def test_what_cannot_be_loaded_is_refused_with_its_reason_and_changes_nothing(fleet: Fleet) -> None:
    for adapter, reason in (
        ("large", "rank_too_large"),
        ("nowhere", "outside_roots"),
        ("../elsewhere", "outside_roots"),
    ):
        status, body = fleet.load("bad", adapter)
        assert (status, json.loads(body)["error"]["reason"]) == (422, reason)
    assert fleet.load("start", "large", load_inplace=True)[0] == 422
    assert fleet.answers_as("start", "start")
    assert "bad" not in fleet.models()


def test_an_adapters_own_template_is_used_for_its_chats(fleet: Fleet) -> None:
    own = fleet.root / "adapters" / "own"
    shutil.copytree(fleet.root / "adapters" / "one", own)
    (own / "chat_template.jinja").write_text("[{{ messages[0]['content'] }}]")
    assert fleet.load("own", "own")[0] == 200
    messages = [{"role": "user", "content": "the fox"}]
    _, with_own = fleet.post("/tokenize", {"model": "own", "messages": messages})
    _, plain = fleet.post("/tokenize", {"model": "tiny", "prompt": "[the fox]", "add_special_tokens": False})
    assert json.loads(with_own)["tokens"] == json.loads(plain)["tokens"]
    (own / "chat_template.jinja").write_text("{{ broken")
    status, body = fleet.load("broken", "own")
    assert (status, json.loads(body)["error"]["reason"]) == (422, "bad_tokenizer")
    assert fleet.unload("own")[0] == 200


def test_requests_in_flight_survive_the_unload_of_their_adapter(fleet: Fleet) -> None:
    assert fleet.load("brief", "one")[0] == 200
    answers: list[tuple[int, str]] = []
    body = {"model": "brief", "prompt": [PROMPT] * 8, "max_tokens": 240, "temperature": 0, "ignore_eos": True, "n": 16}
    running = threading.Thread(target=lambda: answers.append(fleet.post("/v1/completions", body)))
    running.start()
    wait_until(lambda: fleet.server.metric("vllm:num_requests_running") > 0, "the request runs")
    assert fleet.unload("brief")[0] == 200
    running.join(60)
    ((status, answer),) = answers
    assert status == 200
    assert [choice["finish_reason"] for choice in json.loads(answer)["choices"]] == ["length"] * 128


def test_a_worker_that_comes_back_has_what_was_loaded_and_not_what_was_unloaded(fleet: Fleet) -> None:
    assert fleet.load("kept", "two")[0] == 200
    assert fleet.unload("start")[0] == 200
    shutil.rmtree(fleet.root / "adapters" / "start")
    (worker,) = [pid for pid in fleet.server.children() if b"WorkerActor" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: fleet.server.get("/ready")[0] != 200, "the worker is missed")
    wait_until(lambda: fleet.server.get("/ready")[0] == 200, "the worker is back", 90)
    assert fleet.answers_as("kept", "two")
    assert fleet.models() == ["tiny", "kept"]
