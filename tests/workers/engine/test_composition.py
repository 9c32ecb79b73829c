"""Several adapters in one request, each with its weight, against PEFT's `add_weighted_adapter` in float32."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from tiny import Result, gather, run_engine

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import (
    AdapterConflictError,
    AdapterRefusedError,
    AdapterUnavailableError,
    InvalidRequestError,
)
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

GREEDY = SamplingOptions(max_tokens=8, temperature=0.0, logprobs=10, ignore_eos=True)
# Different ranks, targets and scalings. If a sum's first adapter has rsLoRA, PEFT multiplies the sum by the root of its
# rank, a bug; so no combination begins with "mlp".
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 8, "seed": 1},
    "attention": {"rank": 3, "targets": ["q_proj", "v_proj"], "seed": 2, "lora_alpha": 5},
    "mlp": {"rank": 16, "targets": ["gate_proj", "down_proj"], "seed": 3, "use_rslora": True, "strength": 0.05},
    "patterns": {"rank": 4, "seed": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
}
COMPOSITIONS: dict[str, dict[str, float]] = {
    "two": {"all": 0.7, "attention": 0.3},
    "three": {"attention": 1.0, "mlp": 0.5, "patterns": 1.5},
    "negative": {"all": 1.0, "patterns": -0.75},
    "one": {"patterns": 0.4},
    "with nothing of one": {"all": 1.0, "mlp": 0.0},
    "more than whole": {"patterns": 2.0, "mlp": 1.0},
}
PROMPTS = [torch.randint(3, 131, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 14, 47)]
NewEngine = Callable[..., Engine]


@dataclass
class World:
    model_dir: Path
    adapters: dict[str, Path]
    models: dict[str, Any]  # PEFT's, by adapter or composition
    expected: dict[str, Result] = field(default_factory=dict)  # answers that were found to be the reference's


def combine(model: Any, adapters: dict[str, Path], weights: dict[str, float]) -> PeftModel:
    """Return PEFT's sum."""
    first, *others = weights
    combined = PeftModel.from_pretrained(copy.deepcopy(model), str(adapters[first]), adapter_name=first)
    for name in others:
        combined.load_adapter(str(adapters[name]), adapter_name=name)
    combined.add_weighted_adapter([*weights], [*weights.values()], "sum", combination_type="cat")
    combined.set_adapter("sum")
    return combined.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("composition")
    model = tiny.make_model("qwen2", root / "model")
    models: dict[str, Any] = {"base": model}
    adapters = {}
    for name, options in ADAPTERS.items():
        adapters[name] = root / name
        models[name] = tiny.make_adapter(copy.deepcopy(model), root / name, **options)
    models |= {name: combine(model, adapters, weights) for name, weights in COMPOSITIONS.items()}
    return World(root / "model", adapters, models)


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
        assert not engine.has_unfinished()
        engine.check_integrity()
        stats = engine.stats()
        assert stats.num_free_pages == stats.num_pages
        engine.close()


def register(engine: Engine, world: World) -> dict[str, str]:
    return {name: engine.register_adapter(str(path)).digest for name, path in world.adapters.items()}


def request(request_id: str, name: str, prompt: list[int], digests: dict[str, str], **fields: Any) -> GenerateRequest:
    """A request for an adapter, a composition or the base model, by name."""
    parts = tuple((digests[part], weight) for part, weight in COMPOSITIONS.get(name, {}).items())
    options = {"sampling": GREEDY, **fields}
    return GenerateRequest(request_id, tuple(prompt), adapter=digests.get(name), composition=parts, **options)


VARIANTS: dict[str, dict[str, Any]] = {
    "everything in one batch": {"max_num_seqs": 64},
    "chunked prefill": {"max_num_seqs": 8, "max_num_batched_tokens": 13},
    "more adapters than slots": {"max_loras": 3, "max_num_seqs": 8},
    "preemption": {"max_num_seqs": 16, "kv_cache_memory_bytes": 80_000, "max_model_len": 64},
    "one at a time": {"max_loras": 3, "max_num_seqs": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_compositions_single_adapters_and_the_base_model_in_mixed_batches_are_as_in_peft(
    variant: str, world: World, new_engine: NewEngine
) -> None:
    engine = new_engine(**VARIANTS[variant])
    digests = register(engine, world)
    requests = [
        request(f"{name}:{i}", name, prompt, digests) for i, prompt in enumerate(PROMPTS) for name in world.models
    ]
    results = run_engine(engine, requests)
    for request_id, result in results.items():
        name, _, i = request_id.rpartition(":")
        expected = world.expected.get(request_id)
        if expected is None:
            tiny.assert_agrees(result, world.models[name], PROMPTS[int(i)])
            world.expected[request_id] = result
            continue
        assert result.token_ids == expected.token_ids
        logprobs = [[entry.logprob for entry in own.logprobs] for own in (result, expected)]
        torch.testing.assert_close(*map(torch.tensor, logprobs), atol=tiny.TOLERANCE, rtol=0)
    stats = engine.stats()
    if variant == "preemption":
        assert stats.num_preemptions > 0, "the variant must preempt to mean anything"
    if variant == "more adapters than slots":
        assert stats.num_slot_loads > len(ADAPTERS)


def test_pages_are_shared_by_what_is_composed_however_it_is_written(world: World, new_engine: NewEngine) -> None:
    engine = new_engine()
    digests = register(engine, world)
    one, other = digests["all"], digests["patterns"]

    def num_hits(*parts: tuple[str, float], **fields: Any) -> int:
        before = engine.stats().num_prefix_hit_tokens
        run_engine(engine, [GenerateRequest("r", tuple(PROMPTS[2]), GREEDY, composition=parts, **fields)])
        return engine.stats().num_prefix_hit_tokens - before

    assert num_hits((one, 0.5), (other, 1)) == 0
    assert num_hits((other, 1.0), (one, 0.5)) == 32
    assert num_hits((other, 1.0), (one, 0.5), tenant="t") == 0
    assert num_hits((other, 1.0), (one, 0.25)) == 0
    assert num_hits((other, 0.5), (one, 1.0)) == 0
    assert num_hits((one, 0.5)) == 0
    assert num_hits((one, 1.0)) == 0
    run_engine(engine, [GenerateRequest("r", tuple(PROMPTS[2]), GREEDY, one)])
    assert engine.stats().num_prefix_hit_tokens == 64, "one adapter with the weight 1 is that adapter"


def test_a_cancelled_composition_lets_go_of_every_adapter(world: World, new_engine: NewEngine) -> None:
    engine = new_engine(max_loras=2)
    digests = register(engine, world)
    long = dataclasses.replace(GREEDY, max_tokens=200)
    results = {"long": Result(), "waits": Result()}
    engine.submit(request("long", "two", PROMPTS[1], digests, sampling=long))
    while not results["long"].token_ids:
        engine.wait_for_work(1.0)
        gather(engine.step(), results)
    engine.submit(request("waits", "more than whole", PROMPTS[1], digests))
    for _ in range(3):
        gather(engine.step(), results)
    assert engine._slots.is_in_use(digests["all"]) and engine._slots.is_in_use(digests["attention"])
    assert not results["waits"].token_ids
    engine.cancel("long")
    while engine.has_unfinished():
        engine.wait_for_work(1.0)
        gather(engine.step(), results)
        engine.check_integrity()
    assert results["long"].finish is FinishReason.CANCELLED
    assert results["waits"].finish is FinishReason.LENGTH
    engine.submit(request("gone", "two", PROMPTS[1], digests))
    engine.cancel("gone")
    results["gone"] = Result()
    while engine.has_unfinished():
        gather(engine.step(), results)
    assert results["gone"].finish is FinishReason.CANCELLED


def test_an_adapter_is_unloaded_when_the_compositions_that_name_it_have_ended(
    world: World, new_engine: NewEngine
) -> None:
    engine = new_engine()
    digests = register(engine, world)
    results = {"r": Result()}
    engine.submit(request("r", "two", PROMPTS[1], digests))
    freed = engine.unregister_adapter(digests["attention"])
    with pytest.raises(AdapterUnavailableError):
        engine.submit(request("late", "two", PROMPTS[1], digests))
    while engine.has_unfinished():
        assert not freed.done()
        engine.wait_for_work(1.0)
        gather(engine.step(), results)
    assert freed.result(timeout=0).device > 0
    assert results["r"].finish is FinishReason.LENGTH
    assert engine.stats().device_adapters == (digests["all"],)


def test_a_composition_fails_with_any_adapter_that_cannot_be_loaded(
    world: World, new_engine: NewEngine, tmp_path: Path
) -> None:
    engine = new_engine()
    for file in world.adapters["attention"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    digests = register(engine, world) | {"attention": engine.register_adapter(str(tmp_path)).digest}
    engine.unregister_adapter(digests["attention"])  # registered twice, it is one
    engine.step()
    digests["attention"] = engine.register_adapter(str(tmp_path)).digest
    (tmp_path / "adapter_model.safetensors").unlink()
    requests = [request(name, name, PROMPTS[1], digests) for name in ("two", "negative", "all", "attention", "base")]
    results = run_engine(engine, requests)
    for name in ("two", "attention"):
        assert isinstance(results[name].error, AdapterUnavailableError) and not results[name].token_ids
    for name in ("negative", "all", "base"):
        assert results[name].finish is FinishReason.LENGTH


def test_weights_and_numbers_that_cannot_be_are_refused(world: World, new_engine: NewEngine) -> None:
    engine = new_engine(max_loras=2)
    digests = list(register(engine, world).values())
    for parts, named in (
        ([(digests[0], 1.0), (digests[0], 2.0)], "named once"),
        ([(digests[0], math.nan), (digests[1], 2.0)], "weight is nan"),
        ([(digests[0], math.inf)], "weight is inf"),
        ([(digests[0], -100.5)], "between -100 and 100"),
        ([(f"{number}", 1.0) for number in range(9)], "9 adapters are named; at most 8"),
        ([(digest, 1.0) for digest in digests[:3]], "3 adapters are named; at most 2"),
    ):
        with pytest.raises(InvalidRequestError, match=named) as caught:
            engine.submit(GenerateRequest("r", (5,), GREEDY, composition=tuple(parts)))
        assert caught.value.param == "adapters"
    with pytest.raises(InvalidRequestError, match="named once"):
        GenerateRequest("r", (5,), GREEDY, digests[0], composition=((digests[1], 1.0),))
    with pytest.raises(AdapterUnavailableError):
        engine.submit(GenerateRequest("r", (5,), GREEDY, composition=((digests[1], 1.0), ("unknown", 1.0))))


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "biases"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["norm"]}, "norms of its own"),
        ({"modules_to_save": ["lm_head"]}, "changes of lm_head"),
        ({"trainable_token_indices": [5]}, "changes of embed_tokens"),
        ({"targets": ["q_proj", "lm_head"], "save_embedding_layers": False}, "changes of lm_head"),
        ({"alora_invocation_tokens": [7]}, "invocation tokens"),
    ],
    ids=str,
)
def test_an_adapter_that_is_more_than_lora_on_linears_is_used_alone(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = tiny.make_model("llama-biased", tmp_path / "model")
    tiny.make_adapter(copy.deepcopy(model), tmp_path / "plain")
    tiny.make_adapter(model, tmp_path / "other", seed=2, **options)
    config = EngineConfig(model=str(tmp_path / "model"), dtype="float32", lora=LoRAConfig())
    engine = Engine.from_config(config)
    try:
        plain, other = (engine.register_adapter(str(tmp_path / name)) for name in ("plain", "other"))
        assert (plain.not_composable, named in other.not_composable) == ("", True)
        for parts in (((plain.digest, 1.0), (other.digest, 1.0)), ((other.digest, 0.5),)):
            with pytest.raises(AdapterRefusedError, match=f"{other.digest} has .*{named}") as caught:
                engine.submit(GenerateRequest("r", (5,), GREEDY, composition=parts))
            assert caught.value.reason == "not_composable"
        request = GenerateRequest("r", (5,), GREEDY, composition=((other.digest, 1.0),))
        assert (request.adapter, request.composition) == (other.digest, ())
    finally:
        engine.close()


def test_pinned_adapters_and_compositions_never_lack_a_slot_for_good(world: World, new_engine: NewEngine) -> None:
    engine = new_engine(max_loras=3)
    digests = register(engine, world)
    engine.pin_adapter(digests["mlp"])
    engine.submit(request("r", "two", PROMPTS[1], digests))
    with pytest.raises(AdapterConflictError, match="leave an unfinished request too few adapter slots"):
        engine.pin_adapter(digests["patterns"])
    results = {"r": Result(), "three": Result()}
    while engine.has_unfinished():
        engine.wait_for_work(1.0)
        gather(engine.step(), results)
    engine.pin_adapter(digests["patterns"])
    with pytest.raises(AdapterConflictError, match="needs 2 adapter slots, but pinned adapters hold 2 of 3"):
        engine.submit(request("r", "two", PROMPTS[1], digests))
    engine.submit(request("three", "three", PROMPTS[1], digests))  # of which two are pinned
    while engine.has_unfinished():
        engine.wait_for_work(1.0)
        gather(engine.step(), results)
    assert results["r"].finish is results["three"].finish is FinishReason.LENGTH
