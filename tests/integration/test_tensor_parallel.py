"""A worker of two ranks in a whole fleet: it answers like one rank, and is replaced as a whole when a rank dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from openai_streams import streams
from serving import Server, start, wait_until

from lorafleet.workers import LLM, LoRARequest, SamplingParams

PROMPTS = ["the quick", "over the lazy dog", "then"]


@pytest.fixture
def server(tiny_model: Path) -> Iterator[Server]:
    server = start(
        str(tiny_model),
        *("--served-model-name", "tiny", "--dtype", "float32", "--tensor-parallel-size", "2"),
        *("--hung-step-s", "4"),
        *("--enable-lora", "--lora-modules", f"good={tiny_model.parent / 'good'}"),
    )
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def ranks(server: Server) -> dict[str, int]:
    """Return pids of the ranks' processes by name."""
    pids = {}
    for pid in server.children():
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue
        if name.startswith(("ray::WorkerActor", "ray::FollowerActor")):
            pids[name.split(".")[0]] = pid
    return pids


def are_gone(server: Server, pids: set[int]) -> bool:
    return not pids & set(ranks(server).values())


def test_two_ranks_answer_as_one_and_are_replaced_together(server: Server, tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), dtype="float32", enable_lora=True)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    good = LoRARequest("good", 1, str(tiny_model.parent / "good"))
    expected = {
        model: [output.outputs[0].text for output in llm.generate(PROMPTS, params, lora_request=lora)]
        for model, lora in (("tiny", None), ("good", good))
    }
    for model, texts in expected.items():
        assert server.complete(model, PROMPTS) == texts
    undisturbed = streams(server, lambda: None)
    for victim, number in (
        ("ray::FollowerActor", signal.SIGKILL),
        ("ray::WorkerActor", signal.SIGKILL),
        ("ray::FollowerActor", signal.SIGSTOP),  # the other rank's step hangs
    ):
        before = ranks(server)
        assert len(before) == 2
        assert streams(server, partial(os.kill, before[victim], number)) == undisturbed, "they wait for a new worker"
        wait_until(partial(are_gone, server, set(before.values())), f"{victim} is gone, and the other rank with it")
        for model, texts in expected.items():
            assert server.complete(model, PROMPTS) == texts
    server.stop()
    wait_until(lambda: not server.survivors(), "nothing is left")
