"""The engine on a CUDA device: steps overlap, decode steps are graphs, and results equal transformers' and peft's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import run_engine

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.scheduling.batch import Scheduled, StepPlan, in_row_order
from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

PROMPTS = [tuple(range(7, 7 + length)) for length in (1, 15, 16, 17, 60)]
GREEDY = SamplingOptions(max_tokens=20, temperature=0.0, logprobs=5, ignore_eos=True)
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 8, "seed": 1},
    "attention": {"rank": 3, "targets": ["q_proj", "v_proj"], "seed": 2},
    "dora": {"rank": 4, "seed": 3, "use_dora": True},
    "head": {"rank": 2, "targets": ["q_proj"], "seed": 5, "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("graphs")
    base = tiny.make_model("llama2", root / "model")
    found: dict[str | None, tuple[Path, Any]] = {None: (root / "model", base)}
    for name, options in ADAPTERS.items():
        found[name] = root / name, tiny.make_adapter(copy.deepcopy(base), root / name, strength=0.3, **options)
    return found


@pytest.fixture
def engine(references: dict[str | None, tuple[Path, Any]]) -> Iterator[Engine]:
    config = EngineConfig(
        model=str(references[None][0]), dtype="float32", device="cuda", max_num_seqs=12, lora=LoRAConfig(max_loras=3)
    )
    engine = Engine.from_config(config)
    engine.load()
    engine.bind_thread()
    yield engine
    engine.close()


def test_overlapping_replayed_steps_equal_transformers_and_peft(
    engine: Engine, references: dict[str | None, tuple[Path, Any]]
) -> None:
    assert engine._steps.overlaps and engine._runner._graphs
    digests = {name: engine.register_adapter(str(path)).digest for name, (path, _) in references.items() if name}
    requests = {
        f"{name}:{i}": (name, GenerateRequest(f"{name}:{i}", prompt, GREEDY, digests.get(name) if name else None))
        for i, prompt in enumerate(PROMPTS)
        for name in references
    }
    results = run_engine(engine, [request for _, request in requests.values()])
    for request_id, (name, request) in requests.items():
        tiny.assert_agrees(results[request_id], references[name][1], list(request.prompt_token_ids))


def test_seeds_stops_and_penalties_give_the_same_as_step_by_step(
    engine: Engine, references: dict[str | None, tuple[Path, Any]]
) -> None:
    options = [
        replace(GREEDY, temperature=1.0, seed=7),
        replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.5),
        replace(GREEDY, temperature=2.0, seed=5, stop_token_ids=frozenset(range(0, 131, 5))),
        replace(GREEDY, temperature=0.8, seed=9, top_k=20, top_p=0.9, min_p=0.01),
    ]
    requests = [
        GenerateRequest(f"{number}:{i}", prompt, own)
        for number, own in enumerate(options)
        for i, prompt in enumerate(PROMPTS)
    ]
    overlapping = run_engine(engine, requests)
    engine._steps.overlaps = False
    for name, result in run_engine(engine, requests).items():
        assert (result.token_ids, result.finish) == (overlapping[name].token_ids, overlapping[name].finish)


def test_a_replay_equals_the_same_step_without_graphs(engine: Engine) -> None:
    """Every size, also padded ones, with other lengths than at the capture."""
    runner = engine._runner
    graphs = runner._graphs
    for num_seqs in range(1, 13):
        entries = []
        for number in range(num_seqs):
            length = 1 + 19 * number
            request = Request.from_generate(GenerateRequest(f"{number}", (5 + number,) * length, GREEDY), number)
            request.pages = list(range(number * 16, number * 16 + 16))
            request.num_computed_tokens = length - 1
            entries.append(Scheduled(request, 1, slots=()))
        plan = StepPlan(in_row_order(entries), loads=())
        replayed = runner.logits(plan).clone()
        runner._graphs = None
        eager = runner.logits(plan)
        runner._graphs = graphs
        torch.testing.assert_close(replayed, eager, atol=1e-5, rtol=1e-5)
