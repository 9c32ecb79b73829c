"""The engine's guarantees on a tiny model: batching changes nothing, adapters stay separate, every request ends."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import Result, gather, run_engine

from lorafleet.kernels.lora import lora_add_
from lorafleet.workers.adapters.format import AdapterSpec, HostAdapter
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import (
    AdapterRefusedError,
    AdapterUnavailableError,
    ContextLengthError,
    InvalidRequestError,
    LoRAFleetError,
    NonFiniteLogitsError,
    QueueFullError,
)
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

NUM_OUTPUT = 10
GREEDY = SamplingOptions(max_tokens=NUM_OUTPUT, temperature=0.0, ignore_eos=True)
# Different ranks and target modules, so that nothing in a mixed batch lines up by accident.
ADAPTERS: dict[str, dict[str, object]] = {
    "all": {"rank": 8, "targets": tiny.ALL_TARGETS, "seed": 1},
    "attention": {"rank": 3, "targets": ["q_proj", "v_proj"], "seed": 2},
    "mlp": {"rank": 16, "targets": ["gate_proj", "down_proj"], "seed": 3, "use_rslora": True, "strength": 0.05},
    "output": {"rank": 1, "targets": ["o_proj", "up_proj", "k_proj"], "seed": 4, "strength": 0.3},
}


@dataclass
class Fleet:
    """A tiny model on disk with adapters, and the answers of transformers + peft to each prompt."""

    model_dir: Path
    adapter_dirs: dict[str, Path]
    prompts: list[list[int]]
    expected: dict[tuple[str | None, int], list[int]]  # (adapter, prompt index)

    def engine(self, *, max_loras: int = 4, max_cpu_loras: int | None = None, **changes: object) -> Engine:
        lora = LoRAConfig(max_loras=max_loras, max_cpu_loras=max_cpu_loras)
        config = EngineConfig(model=str(self.model_dir), dtype="float32", lora=lora)
        engine = Engine.from_config(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
        engine.load()
        return engine

    def requests(self, engine: Engine, options: SamplingOptions = GREEDY) -> list[GenerateRequest]:
        """Every prompt through the base model and every adapter, interleaved."""
        digests = {name: engine.register_adapter(str(path)).digest for name, path in self.adapter_dirs.items()}
        return [
            GenerateRequest(f"{name or 'base'}:{i}", tuple(prompt), options, digests.get(name) if name else None)
            for i, prompt in enumerate(self.prompts)
            for name in (None, *self.adapter_dirs)
        ]

    def check(self, results: dict[str, Result]) -> None:
        for request_id, result in results.items():
            name, _, index = request_id.partition(":")
            assert result.token_ids == self.expected[None if name == "base" else name, int(index)], request_id


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    root = tmp_path_factory.mktemp("fleet")
    model = tiny.make_model("qwen2", root / "model")
    torch.manual_seed(9)
    prompts = [torch.randint(3, 131, (length,)).tolist() for length in (1, 7, 16, 17, 33, 60)]
    expected: dict[tuple[str | None, int], list[int]] = {}
    expected |= {(None, i): tiny.greedy(model, prompt, NUM_OUTPUT) for i, prompt in enumerate(prompts)}
    adapter_dirs = {}
    for name, options in ADAPTERS.items():
        adapter_dirs[name] = root / name
        adapted = tiny.make_adapter(copy.deepcopy(model), root / name, **options)  # type: ignore[arg-type]
        expected |= {(name, i): tiny.greedy(adapted, prompt, NUM_OUTPUT) for i, prompt in enumerate(prompts)}
    return Fleet(root / "model", adapter_dirs, prompts, expected)


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    """Engines that are closed, and checked for leaks, after the test."""
    opened: list[Engine] = []
    yield opened
    for engine in opened:
        assert not engine.has_unfinished()
        engine.check_integrity()
        stats = engine.stats()
        assert stats.num_free_pages == stats.num_pages
        engine.close()


VARIANTS: dict[str, dict[str, object]] = {
    "everything in one batch": {"max_num_seqs": 64},
    "chunked prefill": {"max_num_seqs": 8, "max_num_batched_tokens": 13},
    "more adapters than slots": {"max_loras": 2, "max_num_seqs": 8},
    "one slot, small host cache": {"max_loras": 1, "max_cpu_loras": 2, "max_num_seqs": 8},
    "preemption": {"max_num_seqs": 16, "kv_cache_memory_bytes": 150_000, "max_model_len": 96},
    "pages of eight": {"block_size": 8},
    "one at a time": {"max_num_seqs": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_batches_give_the_tokens_of_transformers_and_peft(
    variant: str, fleet: Fleet, engines: list[Engine]
) -> None:
    engine = fleet.engine(**VARIANTS[variant])  # type: ignore[arg-type]
    engines.append(engine)
    requests = fleet.requests(engine)
    if variant == "preemption":  # load all adapters first: load times must not decide which requests meet
        run_engine(engine, [request for request in requests if request.request_id.endswith(":0")])
    fleet.check(run_engine(engine, requests))
    if variant == "preemption":
        assert engine.stats().num_preemptions > 0, "the variant must preempt to mean anything"
    if "slot" in variant:
        assert engine.stats().num_slot_loads >= len(ADAPTERS) > len(engine.stats().device_adapters)


def test_requests_that_arrive_one_by_one_join_the_batch(fleet: Fleet, engines: list[Engine]) -> None:
    engine = fleet.engine(max_loras=2)
    engines.append(engine)
    requests = fleet.requests(engine)
    results = {request.request_id: Result() for request in requests}
    for request in requests:
        engine.submit(request)
        gather(engine.step(), results)
    while engine.has_unfinished():
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)
    fleet.check(results)


def test_an_adapter_with_nan_weights_fails_its_own_requests_only(
    fleet: Fleet, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fleet.engine()
    engines.append(engine)
    requests = fleet.requests(engine)
    poisoned = next(request.adapter for request in requests if request.request_id == "all:0")
    load = engine._store.fetch

    def fetch(digest: str):  # type: ignore[no-untyped-def]
        future = load(digest)
        if digest == poisoned:
            for a_RI, b_RO, *_ in future.result().weights.values():
                a_RI.fill_(torch.nan)
                b_RO.fill_(torch.nan)
        return future

    monkeypatch.setattr(engine._store, "fetch", fetch)
    results = run_engine(engine, requests)
    for request_id, result in list(results.items()):
        if request_id.startswith("all:"):
            assert result.finish is FinishReason.ERROR and isinstance(result.error, NonFiniteLogitsError)
            del results[request_id]
    fleet.check(results)


def test_nan_keys_left_in_pages_harm_nobody_who_gets_the_pages_next(fleet: Fleet, engines: list[Engine]) -> None:
    engine = fleet.engine(max_num_seqs=64)
    engines.append(engine)
    engine._runner._cache.keys.fill_(torch.nan)
    engine._runner._cache.values.fill_(torch.nan)
    fleet.check(run_engine(engine, fleet.requests(engine)))


def test_two_names_of_the_same_weights_share_a_slot(fleet: Fleet, engines: list[Engine], tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in fleet.adapter_dirs["all"].iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    engine = fleet.engine()
    engines.append(engine)
    assert engine.register_adapter(str(fleet.adapter_dirs["all"])).digest == engine.register_adapter(str(copied)).digest


def test_cancelling_frees_everything_at_once(fleet: Fleet, engines: list[Engine]) -> None:
    engine = fleet.engine(max_loras=1)
    engines.append(engine)
    requests = fleet.requests(engine, dataclasses.replace(GREEDY, max_tokens=100))
    for request in requests:
        engine.submit(request)
    results = {request.request_id: Result() for request in requests}
    for _ in range(5):
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)
    for request in requests:
        engine.cancel(request.request_id)
    engine.cancel("never was")
    gather(engine.step(), results)
    assert all(result.finish is FinishReason.CANCELLED for result in results.values())
    assert not engine.has_unfinished()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_pages) == (0, 0, stats.num_pages)


def test_an_adapter_that_changed_on_disk_fails_its_requests_by_name(
    fleet: Fleet, engines: list[Engine], tmp_path: Path
) -> None:
    moving = tmp_path / "moving"
    moving.mkdir()
    for file in fleet.adapter_dirs["all"].iterdir():
        (moving / file.name).write_bytes(file.read_bytes())
    engine = fleet.engine()
    engines.append(engine)
    digest = engine.register_adapter(str(moving)).digest
    tensors = load_file(moving / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, moving / "adapter_model.safetensors")
    results = run_engine(
        engine,
        [GenerateRequest("moved", (5, 6), GREEDY, digest), GenerateRequest("base:0", tuple(fleet.prompts[0]), GREEDY)],
    )
    moved = results.pop("moved")
    assert moved.finish is FinishReason.ERROR and isinstance(moved.error, AdapterUnavailableError)
    assert "have changed since it was registered" in moved.error.message
    fleet.check(results)
    # The new content counts as another adapter at once.
    assert engine.register_adapter(str(moving)).digest != digest


def test_an_adapter_that_waits_for_a_slot_is_in_the_host_cache_before_it_gets_one(
    fleet: Fleet, engines: list[Engine]
) -> None:
    engine = fleet.engine(max_loras=1)
    engines.append(engine)
    requests = {request.request_id: request for request in fleet.requests(engine)}
    first, second = requests["all:1"], requests["mlp:1"]
    assert first.adapter and second.adapter
    results = {request.request_id: Result() for request in (first, second)}
    engine.submit(first)
    while not engine.stats().num_running:
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)
    engine.submit(second)
    while engine.has_unfinished():
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)
        stats = engine.stats()
        if second.adapter in stats.loading_adapters + stats.device_adapters:
            assert second.adapter in stats.host_adapters
    fleet.check(results)
    assert engine.stats().num_adapter_loads == 2, "the slot was filled from the host cache"


def test_an_adapter_that_cannot_be_read_fails_its_own_requests_only_and_takes_no_slot(
    fleet: Fleet, engines: list[Engine], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in fleet.adapter_dirs["mlp"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "adapter_config.json").read_text())
    # A different adapter than its copy's source, which could be read by mistake.
    (broken / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    engine = fleet.engine(max_loras=1)
    engines.append(engine)
    requests = [request for request in fleet.requests(engine) if not request.request_id.startswith("mlp:")]
    digest = engine.register_adapter(str(broken)).digest
    (broken / "adapter_model.safetensors").unlink()
    requests.insert(2, GenerateRequest("broken", (5, 6), GREEDY, digest))
    loads = []
    load = engine._store._load

    def counted(spec: AdapterSpec, *rest: object) -> HostAdapter:
        loads.append(spec.digest)
        return load(spec, *rest)

    engine._store._load = counted
    for request in requests:
        engine.submit(request)
    results = {request.request_id: Result() for request in requests}
    while engine.has_unfinished():
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)
        engine._store.check_integrity()
        assert digest not in engine.stats().loading_adapters
    assert digest in loads
    failed = results.pop("broken")
    assert failed.finish is FinishReason.ERROR and isinstance(failed.error, AdapterUnavailableError)
    fleet.check(results)


def test_base_batches_run_no_lora_op(fleet: Fleet, engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafleet.workers.model import lora

    calls = 0
    add = lora_add_

    def counted(*args: object) -> None:
        nonlocal calls
        calls += 1
        add(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(lora, "lora_add_", counted)
    engine = fleet.engine(enforce_eager=True)  # else a step of a known shape makes no call from Python
    engines.append(engine)
    requests = fleet.requests(engine)
    run_engine(engine, [request for request in requests if request.adapter is None])
    assert calls == 0
    steps = engine.stats().num_steps
    run_engine(engine, [request for request in requests if request.adapter is not None][:4])
    num_layers, fused_linears = 3, 4
    assert calls == (engine.stats().num_steps - steps) * num_layers * fused_linears, "one call per fused linear"


@pytest.mark.parametrize(
    ("prompt", "options", "adapter", "error"),
    [
        ((), GREEDY, None, InvalidRequestError),
        ((5, 131), GREEDY, None, InvalidRequestError),
        ((-1,), GREEDY, None, InvalidRequestError),
        ((5,), dataclasses.replace(GREEDY, stop_token_ids=frozenset([131])), None, InvalidRequestError),
        ((5,), dataclasses.replace(GREEDY, max_tokens=256), None, ContextLengthError),
        ((5,), GREEDY, "no such digest", AdapterUnavailableError),
    ],
)
def test_what_cannot_run_is_refused_on_submission(
    prompt: tuple[int, ...],
    options: SamplingOptions,
    adapter: str | None,
    error: type[LoRAFleetError],
    fleet: Fleet,
    engines: list[Engine],
) -> None:
    engine = fleet.engine()
    engines.append(engine)
    with pytest.raises(error):
        engine.submit(GenerateRequest("bad", prompt, options, adapter))


def test_a_full_queue_and_a_reused_id_are_refused(fleet: Fleet, engines: list[Engine]) -> None:
    engine = fleet.engine(max_num_seqs=1, max_waiting=1)
    engines.append(engine)
    first, second, third = (GenerateRequest(name, (5,), GREEDY) for name in "abc")
    engine.submit(first)
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.submit(first)
    engine.submit(second)
    with pytest.raises(QueueFullError, match="limit is 2"):
        engine.submit(third)
    while engine.has_unfinished():
        engine.step()


def test_one_tenants_requests_leave_others_places_in_the_queue(fleet: Fleet, engines: list[Engine]) -> None:
    engine = fleet.engine(max_num_seqs=1, max_waiting=15)
    engines.append(engine)
    for number in range(14):
        engine.submit(GenerateRequest(f"a{number}", (5,), GREEDY, tenant="a"))
    with pytest.raises(QueueFullError, match="14 are yours"):
        engine.submit(GenerateRequest("a14", (5,), GREEDY, tenant="a"))
    engine.submit(GenerateRequest("b0", (5,), GREEDY, tenant="b"))
    while engine.has_unfinished():
        engine.step()
    assert engine._accepted.places is not None and engine._accepted.places.num_taken == 0


def test_more_clients_than_the_bound_can_serve_are_refused_while_others_go_on(
    fleet: Fleet, engines: list[Engine]
) -> None:
    engine = fleet.engine(max_num_seqs=1, max_adapter_wait_s=1.0)
    engines.append(engine)
    requests = [GenerateRequest(f"{n}", (5,), GREEDY, tenant=f"t{n}") for n in range(5)]
    for request in requests[:4]:
        engine.submit(request)
    with pytest.raises(QueueFullError, match=r"^4 flows .* for 1 seats; --max-adapter-wait-s 1 can be kept for 4\."):
        engine.submit(requests[4])
    engine.submit(dataclasses.replace(requests[3], request_id="of one that waits anyhow"))
    engine.step()
    engine.submit(requests[4])
    while engine.has_unfinished():
        engine.step()
    admission = engine._accepted.admission
    assert not admission.num_waiting_flows and not admission._requests


def test_tenants_and_priorities_reach_the_order_of_service(fleet: Fleet, engines: list[Engine]) -> None:
    engine = fleet.engine(max_num_seqs=1)
    engines.append(engine)
    first = [GenerateRequest(f"a{n}", (5, 6), GREEDY, tenant="a") for n in range(3)]
    later = GenerateRequest("b", (5, 6), GREEDY, tenant="b")
    urgent = GenerateRequest("urgent", (5, 6), GREEDY, tenant="a", priority=-1)
    for request in (*first, later, urgent):
        engine.submit(request)
    ended = []
    while engine.has_unfinished():
        ended += [event.request_id for event in engine.step() if event.finish]
    assert ended == ["urgent", "b", "a0", "a1", "a2"]


def test_an_adapter_without_lora_is_refused(fleet: Fleet, engines: list[Engine]) -> None:
    engine = fleet.engine(lora=None)
    engines.append(engine)
    with pytest.raises(AdapterRefusedError, match="--enable-lora"):
        engine.register_adapter(str(fleet.adapter_dirs["all"]))
