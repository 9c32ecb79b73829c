"""Activated adapters against peft in float32: where they begin, with what they share batches and pages."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from tiny import Result, run_engine

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.errors import AdapterRefusedError, AdapterUnavailableError

GREEDY = SamplingOptions(max_tokens=8, temperature=0.0, logprobs=10, ignore_eos=True)
PAGE = 16
INVOCATIONS: dict[str, list[int]] = {"judge": [7], "rewrite": [11, 12, 11], "cite": [11, 12]}
OPTIONS: dict[str, dict[str, Any]] = {
    "judge": {"rank": 8, "seed": 1},
    "rewrite": {"rank": 3, "targets": ["q_proj", "v_proj", "down_proj"], "seed": 2, "strength": 0.3},
    "cite": {"rank": 5, "seed": 3, "use_rslora": True},
    "plain": {"rank": 4, "seed": 4},
}
NewEngine = Callable[..., Engine]


def text(length: int, seed: int = 0) -> list[int]:
    """Tokens without any invocation in them."""
    return torch.randint(20, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS: list[list[int]] = [
    text(40),
    [*text(40), 7, *text(3, 1)],
    [*text(30), 11, 12, 11, *text(20, 2), 11, 12, 11],  # twice, at the end
    [11, 12, *text(9, 3), 7],
    [7, 11, 12, 11, *text(33, 4)],  # with the first token
    [*text(40), 11, 12, 11, 12, 11, *text(2, 5)],  # one in the other
    [*text(16), 7, *text(14, 6), 11, 12],  # where pages begin and end
    [7],
]


@dataclass
class AsPeft:
    """A PEFT model that begins where it finds its tokens in a prompt, whatever comes behind the prompt."""

    model: PeftModel
    prompt: list[int]
    invocation: list[int]

    def generate(self, **options: Any) -> torch.Tensor:
        return self.model.generate(**options)

    def __call__(self, token_ids: torch.Tensor) -> Any:
        size = len(self.invocation)
        places = range(len(self.prompt) - size + 1)
        starts = [place for place in places if self.prompt[place : place + size] == self.invocation]
        return self.model(token_ids, alora_offsets=[token_ids.shape[1] - starts[-1] if starts else None])


@dataclass
class World:
    model_dir: Path
    adapters: dict[str, Path]
    reference: Callable[[str, list[int]], Any]
    expected: dict[str, Result] = field(default_factory=dict)  # answers that were found to be the reference's


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("activated")
    model = tiny.make_model("qwen2", root / "model")
    adapted = {}
    for name, options in OPTIONS.items():
        tokens = INVOCATIONS.get(name)
        adapted[name] = tiny.make_adapter(copy.deepcopy(model), root / name, **options, alora_invocation_tokens=tokens)

    def reference(name: str, prompt: list[int]) -> Any:
        if name == "base":
            return model
        return AsPeft(adapted[name], prompt, INVOCATIONS[name]) if name in INVOCATIONS else adapted[name]

    return World(root / "model", {name: root / name for name in OPTIONS}, reference)


@pytest.fixture
def new_engine(world: World) -> Iterator[NewEngine]:
    opened: list[Engine] = []

    def make(*, max_loras: int = 4, **changes: Any) -> Engine:
        config = EngineConfig(model=str(world.model_dir), dtype="float32", lora=LoRAConfig(max_loras=max_loras))
        engine = Engine.from_config(dataclasses.replace(config, **changes))
        engine.load()
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.check_integrity()
        stats = engine.stats()
        assert stats.num_free_pages == stats.num_pages
        engine.close()


def register(engine: Engine, world: World) -> dict[str, str | None]:
    return {"base": None} | {name: engine.register_adapter(str(path)).digest for name, path in world.adapters.items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "everything in one batch": {"max_num_seqs": 64},
    "chunked prefill": {"max_num_seqs": 8, "max_num_batched_tokens": 13},
    "one slot": {"max_loras": 1, "max_num_seqs": 8},
    "preemption": {"max_num_seqs": 16, "kv_cache_memory_bytes": 150_000, "max_model_len": 96},
    "pages of eight": {"block_size": 8, "max_num_seqs": 24, "max_num_batched_tokens": 50},
    "nothing shared": {"enable_prefix_caching": False, "max_num_seqs": 24, "max_num_batched_tokens": 100},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_activated_plain_and_no_adapters_in_mixed_batches_are_as_in_peft(
    variant: str, world: World, new_engine: NewEngine
) -> None:
    engine = new_engine(**VARIANTS[variant])
    requests = [
        GenerateRequest(f"{name}:{i}", tuple(prompt), GREEDY, digest)
        for i, prompt in enumerate(PROMPTS)
        for name, digest in register(engine, world).items()
    ]
    results = run_engine(engine, requests)
    for request_id, result in results.items():
        name, _, i = request_id.partition(":")
        prompt = PROMPTS[int(i)]
        expected = world.expected.get(request_id)
        if expected is None:
            tiny.assert_agrees(result, world.reference(name, prompt), prompt)
            world.expected[request_id] = result
        else:
            assert result.token_ids == expected.token_ids
            logprobs = [[entry.logprob for entry in own.logprobs] for own in (result, expected)]
            torch.testing.assert_close(*map(torch.tensor, logprobs), atol=tiny.TOLERANCE, rtol=0)
    if variant == "preemption":
        assert engine.stats().num_preemptions > 0, "the variant must preempt to mean anything"
    if variant != "nothing shared":
        assert engine.stats().num_prefix_hit_tokens > 0


def test_where_a_prompt_lacks_the_tokens_nothing_is_needed_of_the_adapter(world: World, new_engine: NewEngine) -> None:
    engine = new_engine()
    digests = register(engine, world)
    prompt = tuple(PROMPTS[0])
    requests = [GenerateRequest(name, prompt, GREEDY, digests[name]) for name in ("base", "judge", "rewrite")]
    results = run_engine(engine, requests)
    assert results["judge"] == results["rewrite"] == results["base"]
    assert engine.stats().num_slot_loads == 0
    assert engine.stats().num_prefix_hit_tokens == 2 * 32


def test_tokens_that_are_generated_activate_nothing(world: World, new_engine: NewEngine) -> None:
    engine = new_engine()
    digests = register(engine, world)
    prompt = tuple(PROMPTS[0])
    answer = run_engine(engine, [GenerateRequest("r", prompt, GREEDY, digests["judge"])])["r"].token_ids
    path = world.model_dir.parent / "own"
    path.mkdir(exist_ok=True)
    for file in world.adapters["judge"].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = (path / "adapter_config.json").read_text().replace("7\n  ]", f"{answer[2]}\n  ]")
    assert f"{answer[2]}\n  ]" in config
    (path / "adapter_config.json").write_text(config)
    own = engine.register_adapter(str(path)).digest
    assert answer[2] not in prompt
    for _ in range(2):  # its own pages are found, but not as if the prompt went on with the answer
        assert run_engine(engine, [GenerateRequest("r", prompt, GREEDY, own)])["r"].token_ids == answer
    second = (*prompt, *answer, *text(9, 8))
    expected = new_engine(enable_prefix_caching=False)
    expected.register_adapter(str(path))
    for adapter in (own, None):
        (found, right) = (
            run_engine(one, [GenerateRequest("r", second, GREEDY, adapter)])["r"] for one in (engine, expected)
        )
        assert found.token_ids == right.token_ids


def ask(engine: Engine, prompt: list[int], adapter: str | None, **fields: Any) -> tuple[list[int], int]:
    """(answer, tokens of the prompt that were computed)"""
    before = engine.stats()
    result = run_engine(engine, [GenerateRequest("r", tuple(prompt), GREEDY, adapter, **fields)])["r"]
    after = engine.stats()
    num_computed = after.num_prompt_tokens - before.num_prompt_tokens
    assert after.num_prefix_hit_tokens - before.num_prefix_hit_tokens == len(prompt) - num_computed
    return result.token_ids, num_computed


def test_the_turns_of_a_conversation_compute_what_is_new_alone(world: World, new_engine: NewEngine) -> None:
    """base, activated, another activated, base again: each finds all that was computed with the base model."""
    engine, plain = new_engine(), new_engine(enable_prefix_caching=False)
    digests = register(engine, world)
    register(plain, world)
    history = text(50, 1)
    answer, num_computed = ask(engine, history, None)
    assert num_computed == 50
    history += answer  # of 58 tokens 57 are computed, 48 in full pages
    for name, num_new in (("judge", 21), ("rewrite", 23), ("judge", 5)):
        prompt = [*history, *INVOCATIONS[name], *text(10, 2)]
        found, num_computed = ask(engine, prompt, digests[name])
        assert num_computed == num_new, "judge's own page of its first turn is found in its second"
        assert found == ask(plain, prompt, digests[name])[0]
        assert found == tiny.greedy(world.reference(name, prompt), prompt, 8)
    # What an activated adapter said is computed with the base model when the conversation goes on.
    history = [*history, *INVOCATIONS["judge"], *text(10, 2), *found, *text(5, 3)]
    found, num_computed = ask(engine, history, None)
    assert num_computed == len(history) - 48
    assert found == ask(plain, history, None)[0]
    prompt = [*history, 7]
    found, num_computed = ask(engine, prompt, digests["judge"])
    assert num_computed == len(prompt) - len(history) // PAGE * PAGE, (
        "the base model's pages, across its own first turn"
    )
    assert found == ask(plain, prompt, digests["judge"])[0]


def test_the_base_model_finds_what_an_activated_adapter_computed_before_its_tokens(
    world: World, new_engine: NewEngine
) -> None:
    engine = new_engine()
    digests = register(engine, world)
    history = text(70, 1)
    assert ask(engine, [*history, 7, 40], digests["judge"])[1] == 72
    assert ask(engine, history, None)[1] == 70 - 64
    assert ask(engine, [*history, 11, 12], digests["cite"])[1] == 72 - 64
    assert ask(engine, [*history, 40], digests["plain"])[1] == 71, (
        "an adapter that is applied everywhere shares nothing"
    )


def test_nothing_is_shared_between_tenants_or_salts(world: World, new_engine: NewEngine) -> None:
    engine = new_engine()
    digests = register(engine, world)
    prompt = [*text(40), 7, *text(30, 2)]
    for owner in ({}, {"tenant": "a"}, {"tenant": "b"}, {"tenant": "a", "cache_salt": "s"}):
        assert ask(engine, prompt, digests["judge"], **owner)[1] == 71
        assert ask(engine, prompt, digests["judge"], **owner)[1] == 71 - 64
        assert ask(engine, prompt, None, **owner)[1] == 71 - 32


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lora_bias": True}, "biases"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["norm"]}, "norms of its own"),
        ({"modules_to_save": ["lm_head"]}, "changes of lm_head"),
        ({"trainable_token_indices": [5]}, "embed_tokens"),
    ],
    ids=str,
)
def test_what_an_activated_adapter_has_besides_lora_on_linears_is_refused(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = tiny.make_model("llama-biased", tmp_path / "model")
    tiny.make_adapter(model, tmp_path / "adapter", alora_invocation_tokens=[7], **options)
    config = EngineConfig(model=str(tmp_path / "model"), dtype="float32", lora=LoRAConfig())
    engine = Engine.from_config(config)
    try:
        with pytest.raises(AdapterRefusedError, match=f"{named}.*alora_invocation_tokens") as caught:
            engine.register_adapter(str(tmp_path / "adapter"))
        assert caught.value.reason == "unsupported_feature"
    finally:
        engine.close()


def test_dora_with_activation_is_refused_here_as_by_peft(tmp_path: Path) -> None:
    model = tiny.make_model("qwen2", tmp_path / "model")
    with pytest.raises(ValueError, match="unsupported variant combination"):
        tiny.make_adapter(copy.deepcopy(model), tmp_path / "adapter", use_dora=True, alora_invocation_tokens=[7])
    tiny.make_adapter(model, tmp_path / "adapter", use_dora=True)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"alora_invocation_tokens": null', '"alora_invocation_tokens": [7]'))
    engine = Engine.from_config(EngineConfig(model=str(tmp_path / "model"), dtype="float32", lora=LoRAConfig()))
    try:
        with pytest.raises(AdapterRefusedError, match=r"has DoRA.*alora_invocation_tokens") as caught:
            engine.register_adapter(str(tmp_path / "adapter"))
        assert caught.value.reason == "unsupported_feature"
    finally:
        engine.close()


def test_an_adapter_that_is_gone_is_not_answered_by_the_base_model(world: World, new_engine: NewEngine) -> None:
    engine = new_engine()
    digest = engine.register_adapter(str(world.adapters["judge"])).digest
    freed = engine.unregister_adapter(digest)
    engine.step()
    assert freed.done()
    with pytest.raises(AdapterUnavailableError):
        engine.submit(GenerateRequest("r", tuple(PROMPTS[0]), GREEDY, digest))
