"""A request resumed on another engine gives the tokens and log-probabilities of one that was never interrupted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from tiny import Result, run_engine

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

PROMPT = tuple(range(7, 40))
NUM_OUTPUT = 24
OPTIONS = {
    "greedy": SamplingOptions(max_tokens=NUM_OUTPUT, temperature=0.0, ignore_eos=True, logprobs=3),
    "sampled": SamplingOptions(max_tokens=NUM_OUTPUT, seed=5, choice=3, top_p=0.9, ignore_eos=True, logprobs=3),
    "penalized": SamplingOptions(
        max_tokens=NUM_OUTPUT,
        seed=6,
        ignore_eos=True,
        repetition_penalty=1.3,
        presence_penalty=0.8,
        frequency_penalty=0.9,
        logprobs=3,
    ),
    "ruled": SamplingOptions(
        max_tokens=NUM_OUTPUT,
        temperature=0.0,
        ignore_eos=True,
        frequency_penalty=0.3,
        logit_bias=tuple((token, 3.0 - token % 7) for token in range(0, 131, 3)),
        allowed_token_ids=frozenset(range(8, 131, 3)) | frozenset(range(9, 131, 3)),
        bad_words=tuple((i, j) for i in range(8, 131, 3) for j in range(9, 131, 30)),
        logprobs=3,
    ),
    "held from stopping": SamplingOptions(
        max_tokens=NUM_OUTPUT, temperature=0.0, min_tokens=18, stop_token_ids=frozenset(range(3, 131)), logprobs=3
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resumed")
    tiny.make_adapter(tiny.make_model("smollm2", directory / "model"), directory / "plain", strength=0.3)
    model = tiny.make_model("smollm2", directory / "model")
    tiny.make_adapter(model, directory / "activated", strength=0.3, alora_invocation_tokens=[20, 21])
    return directory


@pytest.fixture
def engines(directory: Path) -> Iterator[list[Engine]]:
    """Two engines, as on two workers."""
    config = EngineConfig(
        model=str(directory / "model"), dtype="float32", max_num_batched_tokens=64, lora=LoRAConfig(max_loras=2)
    )
    engines = [Engine.from_config(config) for _ in range(2)]
    for engine in engines:
        engine.load()
    yield engines
    for engine in engines:
        engine.check_integrity()
        engine.close()


def assert_same(cut: Result, whole: Result, num_before: int) -> None:
    assert cut.token_ids == whole.token_ids[num_before:]
    assert cut.finish == whole.finish
    for ours, expected in zip(cut.logprobs, whole.logprobs[num_before:], strict=True):
        assert (ours.rank, ours.top_ids) == (expected.rank, expected.top_ids)
        assert ours.logprob == pytest.approx(expected.logprob, abs=tiny.TOLERANCE)


@pytest.mark.parametrize("adapter", [None, "plain", "activated"])
def test_what_comes_behind_the_seam_is_what_would_have_come(
    adapter: str | None, engines: list[Engine], directory: Path
) -> None:
    digest = None
    for engine in engines:
        digest = adapter and engine.register_adapter(str(directory / adapter)).digest
    requests = [GenerateRequest(name, PROMPT, options, digest) for name, options in OPTIONS.items()]
    whole = run_engine(engines[0], requests)
    assert whole["held from stopping"].finish is FinishReason.STOP
    for num_before in (1, 9, 17):
        cut = [
            replace(request, output_token_ids=tuple(whole[request.request_id].token_ids[:num_before]))
            for request in requests
        ]
        results = run_engine(engines[1], cut)
        for name, result in results.items():
            assert_same(result, whole[name], num_before)


def test_the_engine_that_made_the_tokens_may_go_on_with_them(engines: list[Engine]) -> None:
    """It finds the pages of prompt and output that are still cached."""
    request = GenerateRequest("whole", PROMPT, OPTIONS["greedy"])
    whole = run_engine(engines[0], [request])["whole"]
    cut = dataclasses.replace(request, request_id="cut", output_token_ids=tuple(whole.token_ids[:20]))
    assert_same(run_engine(engines[0], [cut])["cut"], whole, 20)


def test_a_preempted_request_resumes_by_its_rules(directory: Path) -> None:
    """Its tokens are those of an engine with pages for all."""
    requests = [
        GenerateRequest(f"{name}:{number}", PROMPT[number:], options)
        for name, options in OPTIONS.items()
        for number in range(2)
    ]
    results = []
    for kv_bytes in (10_000_000, 90_000):
        config = EngineConfig(
            model=str(directory / "model"), dtype="float32", kv_cache_memory_bytes=kv_bytes, max_model_len=64
        )
        engine = Engine.from_config(config)
        engine.load()
        results.append(run_engine(engine, requests))
        num_preemptions = engine.stats().num_preemptions
        engine.check_integrity()
        engine.close()
    assert num_preemptions > 0
    whole, preempted = results
    for name, result in preempted.items():
        assert_same(result, whole[name], 0)


def test_outputs_that_cannot_be_are_refused(engines: list[Engine]) -> None:
    with pytest.raises(InvalidRequestError, match="24 output tokens are there already"):
        GenerateRequest("all", PROMPT, OPTIONS["greedy"], output_token_ids=(5,) * NUM_OUTPUT)
    with pytest.raises(InvalidRequestError, match="output_token_ids has the token id 131; ids go from 0 to 130"):
        engines[0].submit(GenerateRequest("strange", PROMPT, OPTIONS["greedy"], output_token_ids=(131,)))
