"""Prefix caching gives the same tokens as without; who may share with whom, and who may not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Result, gather, run_engine

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

GREEDY = SamplingOptions(max_tokens=8, temperature=0.0, ignore_eos=True)
PAGE = 16
NewEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prefix")
    model = tiny.make_model("qwen2", root / "model")
    tiny.make_adapters(model, root, ("one", "other"))
    (root / "alias").mkdir()
    for file in (root / "one").iterdir():
        (root / "alias" / file.name).write_bytes(file.read_bytes())
    return root


@pytest.fixture
def new_engine(root: Path) -> Iterator[NewEngine]:
    opened: list[Engine] = []

    def make(**changes: object) -> Engine:
        config = EngineConfig(model=str(root / "model"), dtype="float32", lora=LoRAConfig(max_loras=2))
        engine = Engine.from_config(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
        engine.load()
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.check_integrity()
        stats = engine.stats()
        assert stats.num_free_pages == stats.num_pages, "what is kept counts as free"
        engine.close()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def ask(engine: Engine, token_ids: tuple[int, ...], adapter: str | None = None, **fields: object) -> list[int]:
    """Run one request by itself."""
    request = GenerateRequest("r", token_ids, GREEDY, adapter, **fields)  # type: ignore[arg-type]
    return run_engine(engine, [request])["r"].token_ids


def hits(engine: Engine) -> int:
    return engine.stats().num_prefix_hit_tokens


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 60, 64])
def test_a_prompt_that_comes_again_is_answered_alike_and_computed_in_part(new_engine: NewEngine, length: int) -> None:
    engine, plain = new_engine(), new_engine(enable_prefix_caching=False)
    expected = ask(plain, prompt(length))
    assert ask(engine, prompt(length)) == expected
    assert hits(engine) == 0
    assert ask(engine, prompt(length)) == expected
    assert hits(engine) == (length - 1) // PAGE * PAGE
    assert engine.stats().num_prompt_tokens == 2 * length - hits(engine)
    assert ask(plain, prompt(length)) == expected and hits(plain) == 0


def test_answers_go_on_where_a_conversation_stopped(new_engine: NewEngine) -> None:
    engine, plain = new_engine(), new_engine(enable_prefix_caching=False)
    first = prompt(30)
    answer = ask(engine, first)
    second = (*first, *answer, *prompt(9, seed=1))
    assert ask(engine, second) == ask(plain, second)
    assert hits(engine) == 32, "outputs are found as prompts are"


def test_prompts_that_begin_alike_share_their_beginning(new_engine: NewEngine) -> None:
    engine, plain = new_engine(), new_engine(enable_prefix_caching=False)
    prompts = [prompt(40) + prompt(10 + tail, seed=tail) for tail in range(6)]
    requests = [GenerateRequest(f"{n}", token_ids, GREEDY) for n, token_ids in enumerate(prompts)]
    results, expected = run_engine(engine, requests), run_engine(plain, requests)
    for request in requests:
        assert results[request.request_id].token_ids == expected[request.request_id].token_ids
    assert hits(engine) == 5 * 32, "in the very step that computes it"


def test_choices_of_one_prompt_share_it(new_engine: NewEngine) -> None:
    engine, plain = new_engine(), new_engine(enable_prefix_caching=False)
    options = dataclasses.replace(GREEDY, temperature=1.2, seed=5)
    requests = [GenerateRequest(f"{n}", prompt(50), dataclasses.replace(options, choice=n)) for n in range(4)]
    results, expected = run_engine(engine, requests), run_engine(plain, requests)
    tokens = [results[f"{n}"].token_ids for n in range(4)]
    assert tokens == [expected[f"{n}"].token_ids for n in range(4)]
    assert len({tuple(own) for own in tokens}) > 1
    assert hits(engine) == 3 * 48


def test_chunks_of_a_prompt_are_found_as_they_are_computed(new_engine: NewEngine) -> None:
    small = {"max_num_batched_tokens": 24, "max_num_seqs": 8}
    engine, plain = new_engine(**small), new_engine(**small, enable_prefix_caching=False)
    requests = [GenerateRequest(f"{n}", (*prompt(70), n + 3), GREEDY) for n in range(4)]
    results, expected = run_engine(engine, requests), run_engine(plain, requests)
    for request in requests:
        assert results[request.request_id].token_ids == expected[request.request_id].token_ids
    assert hits(engine) >= 3 * 48


def test_nothing_is_shared_between_adapters_but_by_content(new_engine: NewEngine, root: Path) -> None:
    engine, plain = new_engine(), new_engine(enable_prefix_caching=False)
    one, other, alias = (engine.register_adapter(str(root / name)).digest for name in ("one", "other", "alias"))
    for name in ("one", "other"):
        plain.register_adapter(str(root / name))
    base = ask(engine, prompt(40))
    answers = [ask(engine, prompt(40), adapter) for adapter in (one, other)]
    assert hits(engine) == 0
    assert answers == [ask(plain, prompt(40), adapter) for adapter in (one, other)]
    assert base == ask(plain, prompt(40)) and len({tuple(base), *map(tuple, answers)}) == 3
    assert ask(engine, prompt(40), alias) == answers[0]
    assert hits(engine) == 32, "the same content under another name is the same"


def test_nothing_is_shared_between_tenants_or_salts(new_engine: NewEngine) -> None:
    engine = new_engine()
    owners: list[dict[str, Any]] = [{}, {"tenant": "a"}, {"tenant": "b"}, {"tenant": "a", "cache_salt": "s"}]
    answers = [ask(engine, prompt(40), **owner) for owner in owners]
    assert hits(engine) == 0
    assert answers == [answers[0]] * 4
    for number, owner in enumerate(owners, start=1):
        assert ask(engine, prompt(40), **owner) == answers[0]
        assert hits(engine) == 32 * number


def test_the_first_event_says_how_much_of_the_prompt_was_found(new_engine: NewEngine) -> None:
    engine = new_engine()
    ask(engine, prompt(40))
    engine.submit(GenerateRequest("again", prompt(40), GREEDY))
    found = []
    while engine.has_unfinished():
        found += [event.num_cached_tokens for event in engine.step()]
    assert found == [32] + [0] * 7


def test_a_preempted_request_finds_its_own_pages(new_engine: NewEngine) -> None:
    tight = {"kv_cache_memory_bytes": 60_000, "max_model_len": 96, "max_num_seqs": 16, "lora": None}
    engine, plain = new_engine(**tight), new_engine(enable_prefix_caching=False)
    options = dataclasses.replace(GREEDY, max_tokens=40)
    requests = [GenerateRequest(f"{n}", prompt(20, seed=n), options) for n in range(10)]
    results, expected = run_engine(engine, requests), run_engine(plain, requests)
    for request in requests:
        assert results[request.request_id].token_ids == expected[request.request_id].token_ids
    assert engine.stats().num_preemptions > 0, "or this means nothing"
    assert hits(engine) > 0


def test_pages_are_reused_when_there_are_no_others(new_engine: NewEngine) -> None:
    engine = new_engine(kv_cache_memory_bytes=60_000, max_model_len=96, lora=None)
    answers = [ask(engine, prompt(60, seed=seed)) for seed in range(12)]
    assert [ask(engine, prompt(60, seed=seed)) for seed in range(12)] == answers
    assert hits(engine) < 12 * 48


def test_what_was_not_finite_is_never_found(new_engine: NewEngine, root: Path) -> None:
    engine = new_engine()
    digest = engine.register_adapter(str(root / "one")).digest
    good = ask(engine, prompt(40), digest)
    engine._runner._cache.keys.fill_(torch.nan)  # as if the memory were corrupted
    results = {"r": Result()}
    engine.submit(GenerateRequest("r", prompt(40), GREEDY, digest))
    while engine.has_unfinished():
        gather(engine.step(), results)
    assert results["r"].error is not None
    assert ask(engine, prompt(40), digest) == good
