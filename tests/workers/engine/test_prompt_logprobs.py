"""Log-probabilities of prompts are those of transformers and peft, however the prompt is computed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from tiny import Result, run_engine
from transformers import AutoModelForCausalLM

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import ContextLengthError, InvalidRequestError, NonFiniteLogitsError
from lorafleet.workers.model import decoder, memory_plan, prompt_scores
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

SCORE = SamplingOptions(max_tokens=0, prompt_logprobs=3)
NUM_ADDED = 3
ADAPTERS: dict[str, dict[str, Any]] = {
    "linears": {},
    "head": {"targets": ["q_proj", "lm_head"], "save_embedding_layers": False},
    "norms": {"targets": ["o_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "added": {
        "targets": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "save_embedding_layers": True,
    },
}
NewEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scored")
    tiny.make_model("llama3", root / "model")
    return root


@pytest.fixture(scope="module")
def references(root: Path) -> dict[str | None, Any]:
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    models: dict[str | None, Any] = {None: base}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        own = copy.deepcopy(base)
        if name == "added":
            own.resize_token_embeddings(131 + NUM_ADDED, mean_resizing=False)
        models[name] = tiny.make_adapter(own, root / name, seed=seed + 5, strength=0.2, **options)
    return models


@pytest.fixture
def new_engine(root: Path) -> Iterator[NewEngine]:
    opened: list[Engine] = []

    def make(**changes: Any) -> Engine:
        config = EngineConfig(
            model=str(root / "model"), dtype="float32", lora=LoRAConfig(max_loras=4, lora_full_weight_bytes=1 << 20)
        )
        engine = Engine.from_config(dataclasses.replace(config, **changes))
        engine.load()
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.check_integrity()
        engine.close()


def prompt(length: int, seed: int = 0, vocab_size: int = 131) -> tuple[int, ...]:
    return tuple(torch.randint(3, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def assert_scored(result: Result, reference: PeftModel, token_ids: tuple[int, ...], num_top: int) -> None:
    with torch.no_grad():
        expected = reference(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)
    assert result.error is None and len(result.prompt_logprobs) == len(token_ids) - 1
    for row, next_id, entry in zip(expected[:-1], token_ids[1:], result.prompt_logprobs, strict=True):
        torch.testing.assert_close(entry.logprob, row[next_id].item(), atol=tiny.TOLERANCE, rtol=0)
        assert abs(entry.rank - 1 - int((row > row[next_id]).sum())) <= 1, "but for ties"
        best = row.topk(num_top).values
        torch.testing.assert_close(torch.tensor(entry.top_logprobs), best, atol=tiny.TOLERANCE, rtol=0)
        named = row[list(entry.top_ids)]
        torch.testing.assert_close(named, best, atol=tiny.TOLERANCE, rtol=0)


@pytest.mark.parametrize("max_num_batched_tokens", [512, 7])
def test_base_and_adapters_in_one_batch_agree_with_transformers_and_peft(
    references: dict[str | None, Any],
    new_engine: NewEngine,
    root: Path,
    max_num_batched_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoder, "SCORED_AT_ONCE", 5)
    engine = new_engine(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=4)
    digests = {name: engine.register_adapter(str(root / name)).digest for name in ADAPTERS}
    names: list[str | None] = [None, *ADAPTERS, None, *ADAPTERS]
    prompts = [
        prompt(length, seed, 131 + NUM_ADDED if name == "added" else 131)
        for seed, (name, length) in enumerate(zip(names, (40, 33, 1, 2, 60, 17, 16, 5, 48, 31), strict=True))
    ]
    requests = [
        GenerateRequest(
            f"{number}",
            token_ids,
            SamplingOptions(max_tokens=number % 3, temperature=0.0, prompt_logprobs=number % 5, ignore_eos=True),
            digests.get(name or ""),
        )
        for number, (name, token_ids) in enumerate(zip(names, prompts, strict=True))
    ]
    results = run_engine(engine, requests)
    for number, (name, token_ids) in enumerate(zip(names, prompts, strict=True)):
        result = results[f"{number}"]
        assert_scored(result, references[name], token_ids, number % 5)
        assert len(result.token_ids) == number % 3 and result.finish is FinishReason.LENGTH


def test_a_cached_prefix_is_not_taken_and_is_left_to_others(
    references: dict[str | None, Any], new_engine: NewEngine
) -> None:
    engine = new_engine()
    token_ids = prompt(50)
    for _ in range(2):
        result = run_engine(engine, [GenerateRequest("r", token_ids, SCORE)])["r"]
        assert_scored(result, references[None], token_ids, 3)
    assert engine.stats().num_prefix_hit_tokens == 0
    run_engine(engine, [GenerateRequest("r", token_ids, SamplingOptions(max_tokens=1))])
    assert engine.stats().num_prefix_hit_tokens == 48


def test_they_equal_those_at_generation(new_engine: NewEngine) -> None:
    engine = new_engine()
    generated = SamplingOptions(max_tokens=12, temperature=0.0, logprobs=2, ignore_eos=True)
    token_ids = prompt(20)
    answer = run_engine(engine, [GenerateRequest("r", token_ids, generated)])["r"]
    scored = run_engine(engine, [GenerateRequest("r", (*token_ids, *answer.token_ids), SCORE)])["r"]
    for at_generation, now in zip(answer.logprobs, scored.prompt_logprobs[19:], strict=True):
        assert now.logprob == pytest.approx(at_generation.logprob, abs=tiny.TOLERANCE)
        assert now.rank == at_generation.rank == 1


def test_a_resumed_request_does_not_give_them_again(new_engine: NewEngine) -> None:
    engine = new_engine()
    options = SamplingOptions(max_tokens=4, temperature=0.0, prompt_logprobs=1, ignore_eos=True)
    whole = run_engine(engine, [GenerateRequest("r", prompt(20), options)])["r"]
    resumed = GenerateRequest("r", prompt(20), options, output_token_ids=tuple(whole.token_ids[:2]))
    result = run_engine(engine, [resumed])["r"]
    assert result.token_ids == whole.token_ids[2:] and not result.prompt_logprobs


def test_without_output_the_whole_context_may_be_a_prompt(
    references: dict[str | None, Any], new_engine: NewEngine
) -> None:
    engine = new_engine(max_model_len=64)
    token_ids = prompt(64)
    assert_scored(run_engine(engine, [GenerateRequest("r", token_ids, SCORE)])["r"], references[None], token_ids, 3)
    with pytest.raises(ContextLengthError):
        engine.submit(GenerateRequest("r", (*token_ids, 5), SCORE))


def test_the_logits_of_a_prompt_are_reduced_in_pieces(
    references: dict[str | None, Any], new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    add = prompt_scores.PromptScores.add

    def counted(self: prompt_scores.PromptScores, logits_PV: torch.Tensor) -> None:
        seen.append(len(logits_PV))
        add(self, logits_PV)

    monkeypatch.setattr(prompt_scores.PromptScores, "add", counted)
    token_ids = prompt(200)
    result = run_engine(new_engine(), [GenerateRequest("r", token_ids, SCORE)])["r"]
    assert_scored(result, references[None], token_ids, 3)
    assert sum(seen) == 199 and max(seen) == memory_plan.SCORED_AT_ONCE


def test_named_candidates_take_the_place_of_the_best(references: dict[str | None, Any], new_engine: NewEngine) -> None:
    engine = new_engine()
    options = SamplingOptions(
        max_tokens=3, temperature=0.0, logprobs=0, logprob_token_ids=(9, 100, 30), ignore_eos=True
    )
    plain = SamplingOptions(max_tokens=3, temperature=0.0, logprobs=2, ignore_eos=True)
    token_ids = prompt(10)
    results = run_engine(engine, [GenerateRequest("a", token_ids, options), GenerateRequest("b", token_ids, plain)])
    tiny.assert_agrees(results["b"], references[None], list(token_ids))
    assert results["a"].token_ids == results["b"].token_ids
    with torch.no_grad():
        sequence = torch.tensor([(*token_ids, *results["a"].token_ids)])
        expected = references[None](sequence).logits[0].log_softmax(dim=-1)[9:]
    for row, entry in zip(expected, results["a"].logprobs, strict=False):
        assert sorted(entry.top_ids) == [9, 30, 100]
        assert list(entry.top_logprobs) == sorted(entry.top_logprobs, reverse=True)
        torch.testing.assert_close(torch.tensor(entry.top_logprobs), row[list(entry.top_ids)], atol=1e-4, rtol=0)
    with pytest.raises(InvalidRequestError, match="131"):
        engine.submit(GenerateRequest("r", token_ids, dataclasses.replace(options, logprob_token_ids=(131,))))


def test_a_broken_adapter_ends_only_its_own_request(
    references: dict[str | None, Any], new_engine: NewEngine, root: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    broken = tiny.make_adapter(base, tmp_path / "broken", seed=9)
    broken.get_parameter("base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight").data.fill_(3e38)
    broken.save_pretrained(str(tmp_path / "broken"))
    engine = new_engine()
    digest = engine.register_adapter(str(tmp_path / "broken")).digest
    token_ids = prompt(30)
    requests = [GenerateRequest("bad", token_ids, SCORE, digest), GenerateRequest("good", token_ids, SCORE)]
    results = run_engine(engine, requests)
    assert isinstance(results["bad"].error, NonFiniteLogitsError) and not results["bad"].prompt_logprobs
    assert_scored(results["good"], references[None], token_ids, 3)
