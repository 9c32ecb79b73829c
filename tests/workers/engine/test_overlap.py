"""Overlapping steps, launched before the previous step's tokens are known, give the same results as others.

A GPU overlaps by itself. On a CPU an engine makes the same decisions if told to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import Result, gather, run_engine

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import NonFiniteLogitsError
from lorafleet.workers.model.rules.changes import Changes
from lorafleet.workers.model.rules.rule import History, LogitRule, Row
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

GREEDY = SamplingOptions(max_tokens=9, temperature=0.0, ignore_eos=True)
PROMPTS = [tuple(range(5, 5 + length)) for length in (1, 16, 31, 50)]
OPTIONS = {
    "greedy": GREEDY,
    "seeded": replace(GREEDY, temperature=1.0, seed=7),
    "penalised": replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.2),
    "held back": replace(GREEDY, temperature=1.5, seed=3, ignore_eos=False, min_tokens=6),
    "biased": replace(GREEDY, logit_bias=tuple((token, 3.0 - token % 7) for token in range(0, 131, 3))),
    "limited": replace(GREEDY, allowed_token_ids=frozenset(range(9, 131, 5)), temperature=1.0, seed=5),
    "without words": replace(
        GREEDY,
        bad_words=tuple((i, j) for i in range(0, 131, 2) for j in range(i, 131, 40))[:500],
        repetition_penalty=1.2,
    ),
    "logged": replace(GREEDY, logprobs=4),
    "one token": replace(GREEDY, max_tokens=1),
    "stopped": replace(GREEDY, temperature=2.0, seed=11, stop_token_ids=frozenset(range(0, 131, 4))),
}


@dataclass
class Files:
    """A tiny model with adapters."""

    model: Path
    adapters: dict[str, Path]

    def engine(self, *, overlaps: bool, **changes: object) -> Engine:
        config = EngineConfig(model=str(self.model), dtype="float32", device="cpu", lora=LoRAConfig(max_loras=2))
        engine = Engine.from_config(replace(config, **changes))  # type: ignore[arg-type]
        engine.load()
        engine._overlaps = overlaps
        return engine


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("overlap")
    model = tiny.make_model("smollm2", root / "model")
    adapters = {}
    for number, name in enumerate("abc"):
        adapters[name] = root / name
        tiny.make_adapter(copy.deepcopy(model), root / name, rank=2 + number, seed=number, strength=0.3)
    return Files(root / "model", adapters)


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    """Engines that are closed, and checked for leaks, after the test."""
    opened: list[Engine] = []
    yield opened
    for engine in opened:
        assert not engine.has_unfinished()
        assert not engine.step(), "only a step that nobody waits for any more"
        engine.check_integrity()
        stats = engine.stats()
        assert stats.num_free_pages == stats.num_pages and stats.last_step_age_s == 0.0
        engine.close()


def requests(files: Files, engine: Engine) -> list[GenerateRequest]:
    digests = [None, *(engine.register_adapter(str(path)).digest for path in files.adapters.values())]
    return [
        GenerateRequest(f"{name}:{i}:{j}", prompt, options, digest)
        for name, options in OPTIONS.items()
        for i, prompt in enumerate(PROMPTS)
        for j, digest in enumerate(digests)
    ]


VARIANTS: dict[str, dict[str, object]] = {
    "large batches": {"max_num_seqs": 64},
    "chunked prompts": {"max_num_seqs": 8, "max_num_batched_tokens": 11},
    "preemption": {"max_num_seqs": 16, "kv_cache_memory_bytes": 100_000, "max_model_len": 64},
    "one at a time": {"max_num_seqs": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_overlapping_steps_bring_the_same(files: Files, engines: list[Engine], variant: str) -> None:
    results: list[dict[str, Result]] = []
    for overlaps in (False, True):
        engine = files.engine(overlaps=overlaps, **VARIANTS[variant])
        engines.append(engine)
        results.append(run_engine(engine, requests(files, engine)))
        if variant == "preemption":
            assert engine.stats().num_preemptions > 0
    in_turn, overlapping = results
    for name, expected in in_turn.items():
        ours = overlapping[name]
        assert (ours.token_ids, ours.finish) == (expected.token_ids, expected.finish), name
        for logged, wanted in zip(ours.logprobs, expected.logprobs, strict=True):
            assert logged.top_logprobs == pytest.approx(wanted.top_logprobs, abs=tiny.TOLERANCE)
    finishes = {result.finish for result in overlapping.values()}
    assert finishes == {FinishReason.STOP, FinishReason.LENGTH}


class Counts(LogitRule):
    """Rows with top_k go on from token to token: 7, 8, 9 and so on. A rule that must know the token before."""

    def history(self, sampling: SamplingOptions) -> History | None:
        return History.KNOWN if sampling.top_k else None

    def write(self, rows: Sequence[Row], changes: Changes) -> None:
        for row, request in rows:
            assert not request.num_pending_tokens
            token_id = request.token_ids[-1] + 1
            words = np.zeros((1, 5), np.uint32)
            words[0, token_id // 32] = 1 << token_id % 32
            changes.allow([row], torch.from_numpy(words.view(np.int32)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_whose_rule_must_know_their_tokens_overlap_with_others(
    files: Files, engines: list[Engine], variant: str
) -> None:
    """Other rows keep their tokens; a row that ends while the next step runs is dropped from it."""
    engine = files.engine(overlaps=True, **VARIANTS[variant])
    engines.append(engine)
    plain = requests(files, engine)
    expected = run_engine(engine, plain)
    engine._runner._sampler._rules.append(Counts())
    ruled = [
        GenerateRequest(
            f"ruled:{n}", (5, 6), replace(GREEDY, top_k=1, max_tokens=20, stop_token_ids=frozenset({7 + n}))
        )
        for n in (0, 4, 11, 60)
    ]
    results = run_engine(engine, [request for pair in zip(ruled, plain[::8], strict=False) for request in pair])
    for request in ruled:
        result, last = results.pop(request.request_id), min(request.sampling.stop_token_ids)
        assert list(result.token_ids) == [*range(7, min(last + 1, 27))]
        assert result.finish is (FinishReason.STOP if last < 27 else FinishReason.LENGTH)
    assert {name: result.token_ids for name, result in results.items()} == {
        name: expected[name].token_ids for name in results
    }
    assert len(results) == len(ruled)


def test_a_step_is_launched_before_the_last_ones_tokens_are_published(files: Files, engines: list[Engine]) -> None:
    engine = files.engine(overlaps=True)
    engines.append(engine)
    engine.submit(GenerateRequest("r", PROMPTS[1], replace(GREEDY, max_tokens=3)))
    published = []
    while engine.has_unfinished():
        published.append((len(engine.step()), engine.stats().num_steps))
    assert published == [(0, 1), (1, 2), (1, 3), (1, 3)]


def test_a_request_that_is_cancelled_amid_a_step_has_one_last_event(files: Files, engines: list[Engine]) -> None:
    engine = files.engine(overlaps=True)
    engines.append(engine)
    results = {name: Result() for name in ("gone", "stays")}
    for name in results:
        engine.submit(GenerateRequest(name, PROMPTS[2], GREEDY))
    for _ in range(3):
        gather(engine.step(), results)
    engine.cancel("gone")
    while engine.has_unfinished():
        gather(engine.step(), results)
    assert results["gone"].finish is FinishReason.CANCELLED and len(results["gone"].token_ids) == 2
    assert results["stays"].finish is FinishReason.LENGTH and len(results["stays"].token_ids) == GREEDY.max_tokens


def test_a_request_whose_id_is_taken_again_amid_a_step_gets_its_own_tokens(files: Files, engines: list[Engine]) -> None:
    engine = files.engine(overlaps=True)
    engines.append(engine)
    (expected,) = run_engine(engine, [GenerateRequest("r", PROMPTS[3], GREEDY)]).values()
    engine.submit(GenerateRequest("r", PROMPTS[0], GREEDY))
    engine.step()
    engine.cancel("r")
    (event,) = engine.step()
    assert event.finish is FinishReason.CANCELLED
    (ours,) = run_engine(engine, [GenerateRequest("r", PROMPTS[3], GREEDY)]).values()
    assert ours.token_ids == expected.token_ids


def test_logits_that_are_not_finite_end_their_request_alone(files: Files, engines: list[Engine]) -> None:
    engine = files.engine(overlaps=True, enable_prefix_caching=False)
    engines.append(engine)
    engine.submit(GenerateRequest("r", PROMPTS[2], GREEDY))
    results = {"r": Result()}
    for _ in range(2):
        gather(engine.step(), results)
    engine._runner._cache.keys.fill_(torch.nan)
    while engine.has_unfinished():
        gather(engine.step(), results)
    assert isinstance(results["r"].error, NonFiniteLogitsError)
    (healed,) = run_engine(engine, [GenerateRequest("next", PROMPTS[2], GREEDY)]).values()
    assert healed.finish is FinishReason.LENGTH


def test_an_adapter_is_freed_when_the_step_that_uses_it_is_over(files: Files, engines: list[Engine]) -> None:
    engine = files.engine(overlaps=True)
    engines.append(engine)
    digest = engine.register_adapter(str(files.adapters["a"])).digest
    results = {"r": Result()}
    engine.submit(GenerateRequest("r", PROMPTS[1], GREEDY, digest))
    while not results["r"].token_ids:
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)
    freed = engine.unregister_adapter(digest)
    while engine.has_unfinished():
        assert not freed.done()
        gather(engine.step(), results)
    engine.step()
    assert freed.result(timeout=5).device > 0
    assert len(results["r"].token_ids) == GREEDY.max_tokens
