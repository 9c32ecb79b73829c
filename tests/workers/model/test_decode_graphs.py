"""Recorded and replayed decode steps, with Triton's kernels in the interpreter and a recorder that reruns functions.

tests/gpu has the rest, with real graphs: that the device's launches are recorded.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import run_engine

from lorafleet.kernels.dispatch import forced
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.model.decode_graphs import batch_sizes
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

PROMPT = list(range(7, 18))
GREEDY = SamplingOptions(max_tokens=4, temperature=0.0, logprobs=3, ignore_eos=True)
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 4, "seed": 1},
    "attention": {"rank": 3, "targets": ["q_proj", "v_proj"], "seed": 2},
    "dora": {"rank": 2, "targets": ["o_proj", "up_proj"], "seed": 3, "use_dora": True},
    "norms": {"rank": 2, "targets": ["q_proj"], "seed": 4, "modules_to_save": ["input_layernorm"]},
    "head": {"rank": 2, "targets": ["q_proj"], "seed": 5, "modules_to_save": ["lm_head"]},
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has the same with real graphs")


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [
        (1, [1]),
        (4, [1, 2, 4]),
        (6, [1, 2, 4, 6]),
        (64, [1, 2, 4, *range(8, 65, 8)]),
        (1000, [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32)]),
    ],
)
def test_batch_sizes(max_num_seqs: int, sizes: list[int]) -> None:
    assert batch_sizes(max_num_seqs) == sizes


class Recorder:
    """A stand-in for CUDA graphs: reruns the recorded function, at the same addresses. Counts."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed: Counter[int] = Counter()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        number = self.num_captured
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed[number] += 1
            run()

        return replay


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, tuple[Path, Any]]:
    """Return, by adapter name, its directory and the answers of transformers and peft; None: the base model."""
    root = tmp_path_factory.mktemp("graphs")
    base = tiny.make_model("llama2", root / "model", num_hidden_layers=2)
    found: dict[str | None, tuple[Path, Any]] = {None: (root / "model", base)}
    for name, options in ADAPTERS.items():
        adapted = tiny.make_adapter(copy.deepcopy(base), root / name, strength=0.3, **options)
        found[name] = root / name, adapted
    return found


@pytest.fixture(scope="module")
def engine(references: dict[str | None, tuple[Path, Any]]) -> Iterator[tuple[Engine, Recorder]]:
    """An engine whose steps overlap and whose decode steps are recorded, for up to three requests."""
    config = EngineConfig(
        model=str(references[None][0]),
        dtype="float32",
        device="cpu",
        max_num_seqs=3,
        lora=LoRAConfig(max_loras=3, max_lora_rank=8),
    )
    recorder = Recorder()
    with forced("triton"):
        engine = Engine.from_config(config)
        engine.load()
        engine._runner.capture(recorder)
        engine._steps.overlaps = True
        yield engine, recorder
        engine.close()


def ask(
    engine: Engine, references: dict[str | None, tuple[Path, Any]], names: list[str | None], length: int = len(PROMPT)
) -> None:
    """Check that each request gets its reference's answer."""
    requests = []
    for number, name in enumerate(names):
        digest = None if name is None else engine.register_adapter(str(references[name][0])).digest
        requests.append(GenerateRequest(f"{number}", tuple(PROMPT[: length - number]), GREEDY, digest))
    results = run_engine(engine, requests, timeout_s=300.0)
    for request, name in zip(requests, names, strict=True):
        tiny.assert_agrees(results[request.request_id], references[name][1], list(request.prompt_token_ids))


def test_replayed_steps_equal_transformers_and_peft(
    engine: tuple[Engine, Recorder], references: dict[str | None, tuple[Path, Any]]
) -> None:
    """Graphs for as many rows as requests, with LoRA if a request has an adapter."""
    own, recorder = engine
    assert recorder.num_captured == 2 * len(batch_sizes(3))
    with_lora, without = (range(number, number + 3) for number in (0, 3))  # for 3, 2 and 1 requests
    ask(own, references, [None, None])
    assert set(recorder.num_replayed) == {without[1]}
    recorder.num_replayed.clear()
    ask(own, references, ["all", None, "attention"])
    assert with_lora[0] in recorder.num_replayed, "all three; some begin sooner, while adapters are on their way"
    recorder.num_replayed.clear()
    ask(own, references, ["dora"])
    assert set(recorder.num_replayed) == {with_lora[2]}


@pytest.mark.parametrize("special", ["norms", "head"])
def test_what_no_graph_holds_runs_without_one(
    engine: tuple[Engine, Recorder], references: dict[str | None, tuple[Path, Any]], special: str
) -> None:
    own, recorder = engine
    ask(own, references, [special])  # it is in a slot from now on, so that the next two begin together
    recorder.num_replayed.clear()
    ask(own, references, [None, special])
    assert not recorder.num_replayed
    ask(own, references, ["all"])
    assert recorder.num_replayed


def test_rows_that_fill_a_batch_up_touch_no_request(
    engine: tuple[Engine, Recorder],
    references: dict[str | None, tuple[Path, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two requests in the graph for three; the padding row writes to a page of its own."""
    own, _ = engine
    monkeypatch.setattr(own._runner._graphs, "_sizes", [3])
    own._runner._cache.keys[:, -1] = torch.nan
    ask(own, references, ["all", None])
    assert own._runner._cache.keys[:, -1, :, 0].isfinite().all()
    assert own._runner._cache.keys[:, -1, :, 1:].isnan().all()
