"""Requests that could never run are refused; waiting ones are ended; an idle engine sleeps; a failed one says so."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from tiny import Result, gather

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine import loop as loop_module
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.registered import RegisteredAdapters
from lorafleet.workers.errors import AdapterConflictError, InternalError, QueueFullError
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.scheduling.stuck_watch import StuckWatch

GREEDY = SamplingOptions(max_tokens=4, temperature=0.0, ignore_eos=True)
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, plain adapters a, b, c, and one, two and three, which have their own embedding."""
    root = tmp_path_factory.mktemp("room")
    model = tiny.make_model("llama3", root / "model")
    tiny.make_adapters(model, root, ("a", "b", "c"))
    own = {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    tiny.make_adapters(model, root, ("one", "two", "three"), **own)
    return root


@pytest.fixture
def make_engine(root: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(num_tables: float = 1.5, max_loras: int = 4, **changes: object) -> Engine:
        """num_tables: the number of embeddings that fit."""
        lora = LoRAConfig(max_loras=max_loras, lora_full_weight_bytes=int(num_tables * 131 * 48 * 4))
        config = EngineConfig(model=str(root / "model"), dtype="float32", num_threads=1, max_adapter_wait_s=0.0)
        config = dataclasses.replace(config, lora=lora, kv_cache_memory_bytes=4_000_000)
        engine = Engine.from_config(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
        engine.load()
        engine.bind_thread()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        if engine._failure is None:
            engine.check_integrity()
        engine.close()


def digests_of(engine: Engine, root: Path, *names: str) -> list[str]:
    return [engine.register_adapter(str(root / name)).digest for name in names]


def run(engine: Engine, results: dict[str, Result]) -> int:
    """Step until all requests have ended; return the number of steps."""
    deadline = time.monotonic() + TIMEOUT_S
    num_steps = 0
    while engine.has_unfinished():
        assert time.monotonic() < deadline
        if engine.wait_for_work(timeout_s=0.5):
            num_steps += 1
            gather(engine.step(), results)
    return num_steps


def test_a_request_whose_embedding_has_no_room_beside_pinned_ones_is_refused(
    make_engine: Callable[..., Engine], root: Path
) -> None:
    engine = make_engine()
    one, two, plain = digests_of(engine, root, "one", "two", "a")
    engine.pin_adapter(one)
    with pytest.raises(
        AdapterConflictError, match=r"bytes of the pool.*pinned adapters hold.*--lora-full-weight-bytes"
    ):
        engine.submit(GenerateRequest("r", (5, 6), GREEDY, two))
    results = {name: Result() for name in ("pinned", "plain", "base")}
    for name, digest in (("pinned", one), ("plain", plain), ("base", None)):
        engine.submit(GenerateRequest(name, (5, 6), GREEDY, digest))
    run(engine, results)
    assert all(result.finish is FinishReason.LENGTH for result in results.values())
    engine.unregister_adapter(one)
    results = {"r": Result()}
    engine.submit(GenerateRequest("r", (5, 6), GREEDY, two))
    run(engine, results)
    assert results["r"].finish is FinishReason.LENGTH


def test_a_pin_that_would_leave_an_accepted_request_no_room_is_refused(
    make_engine: Callable[..., Engine], root: Path
) -> None:
    engine = make_engine()
    one, two = digests_of(engine, root, "one", "two")
    engine.submit(GenerateRequest("r", (5, 6), GREEDY, two))
    retired = engine.unregister_adapter(two)  # which does not make it go away
    with pytest.raises(AdapterConflictError, match="unfinished request's embedding or head too little memory"):
        engine.pin_adapter(one)
    results = {"r": Result()}
    run(engine, results)
    assert results["r"].finish is FinishReason.LENGTH and retired.done()
    engine.pin_adapter(one)


def test_pins_that_have_no_room_together_are_refused(make_engine: Callable[..., Engine], root: Path) -> None:
    engine = make_engine(num_tables=2.5)
    one, two, three = digests_of(engine, root, "one", "two", "three")
    engine.pin_adapter(one)
    engine.pin_adapter(two)
    with pytest.raises(AdapterConflictError, match=r"pinned adapters would take \d+ bytes.*--lora-full-weight-bytes"):
        engine.pin_adapter(three)
    engine.repin_adapters({three}, {two})
    results = {"r": Result()}
    engine.submit(GenerateRequest("r", (5, 6), GREEDY, three))
    run(engine, results)
    assert results["r"].finish is FinishReason.LENGTH


def test_an_unpinned_adapter_makes_room_again(make_engine: Callable[..., Engine], root: Path) -> None:
    engine = make_engine(max_loras=2)
    digests = digests_of(engine, root, "a", "b", "c")
    engine.pin_adapter(digests[0])
    engine.repin_adapters({digests[1]}, {digests[0]})
    for number, digest in enumerate(digests * 2):
        results = {f"{number}": Result()}
        engine.submit(GenerateRequest(f"{number}", (5, 6), GREEDY, digest))
        run(engine, results)
    assert digests[1] in engine.stats().device_adapters
    assert engine._slots.num_pinned == 1


def test_what_can_never_begin_is_ended_and_the_engine_sleeps_until_then(
    make_engine: Callable[..., Engine], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "StuckWatch", lambda: StuckWatch(0.5))
    monkeypatch.setattr(loop_module, "LOOK_AGAIN_S", 0.05)
    engine = make_engine(max_loras=1)
    (digest,) = digests_of(engine, root, "a")
    engine._slots.start_load("a stranger")  # bypassing all memory checks
    engine._slots.finish_load("a stranger")
    engine._slots.pin("a stranger", True)
    results = {"stuck": Result(), "base": Result()}
    engine.submit(GenerateRequest("stuck", (5, 6), GREEDY, digest))
    engine.submit(GenerateRequest("base", (5, 6), GREEDY))
    num_steps = run(engine, results)
    assert results["base"].finish is FinishReason.LENGTH
    assert isinstance(results["stuck"].error, InternalError)
    assert num_steps < 100, "looking again and again is a whole core's work"
    engine._slots.pin("a stranger", False)
    engine._slots.drop("a stranger")


def test_an_engine_whose_step_failed_takes_nothing_more_and_ends_what_is_awaited(
    make_engine: Callable[..., Engine], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    (digest,) = digests_of(engine, root, "a")
    engine.submit(GenerateRequest("r", (5, 6), GREEDY, digest))
    freed = engine.unregister_adapter(digest)

    def fail() -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(engine._scheduler, "schedule", fail)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.step()
    assert not engine.has_unfinished()
    assert isinstance(freed.exception(0), InternalError)
    for ask in (engine.step, lambda: engine.submit(GenerateRequest("late", (5, 6), GREEDY))):
        with pytest.raises(InternalError, match="A step of the engine failed"):
            ask()
    monkeypatch.undo()


def test_without_a_limit_any_number_waits_and_the_scheduler_knows_a_part(
    make_engine: Callable[..., Engine], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_MAX_PLANNED", 3)
    engine = make_engine(max_waiting=None, max_num_seqs=2)
    (digest,) = digests_of(engine, root, "a")
    results = {f"{number}": Result() for number in range(40)}
    for number in range(40):
        engine.submit(GenerateRequest(f"{number}", (5, 6), GREEDY, digest if number % 2 else None))
    freed = engine.unregister_adapter(digest)
    engine.cancel("37")
    gather(engine.step(), results)
    assert results["37"].finish is FinishReason.CANCELLED
    assert engine._scheduler.num_waiting <= 3 and engine.stats().num_waiting + engine.stats().num_running == 39
    engine.check_integrity()
    with pytest.raises(Exception, match="in use"):
        engine.submit(GenerateRequest("38", (5, 6), GREEDY))
    while not freed.done():
        assert engine.has_unfinished(), "it is freed with its last request"
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)
    run(engine, results)
    assert {result.finish for name, result in results.items() if name != "37"} == {FinishReason.LENGTH}


def test_a_step_takes_in_so_many_requests_and_those_of_another_tenant_among_the_first(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_MAX_ARRIVALS", 4)
    engine = make_engine(max_waiting=None, max_num_seqs=2)
    results = {f"{number}": Result() for number in range(20)} | {"other": Result()}
    for number in range(20):
        engine.submit(GenerateRequest(f"{number}", (5, 6), GREEDY, tenant="many"))
    engine.submit(GenerateRequest("other", (5, 6), GREEDY, tenant="other"))
    for num_taken in (4, 8, 12):
        gather(engine.step(), results)
        assert engine._scheduler.num_running + engine._scheduler.num_waiting == num_taken
        assert "other" in engine._scheduler
        assert engine.stats().num_waiting + engine.stats().num_running == 21
        assert engine.wait_for_work(timeout_s=0.0)
    engine.cancel("19")
    gather(engine.step(), results)
    assert results["19"].finish is FinishReason.CANCELLED
    run(engine, results)


def test_with_a_limit_more_are_refused(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_waiting=1, max_num_seqs=1)
    for number in range(2):
        engine.submit(GenerateRequest(f"{number}", (5, 6), GREEDY))
    with pytest.raises(QueueFullError, match="limit is 2"):
        engine.submit(GenerateRequest("2", (5, 6), GREEDY))
    run(engine, {f"{number}": Result() for number in range(2)})


def test_many_adapters_that_leave_at_once_are_freed_a_few_a_step(
    make_engine: Callable[..., Engine], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    digests = digests_of(engine, root, "a", "b", "c", "one")
    monkeypatch.setattr(RegisteredAdapters, "MAX_FREED", 2)
    freed = [engine.unregister_adapter(digest) for digest in digests]
    num_steps = 0
    while not all(future.done() for future in freed):
        assert engine.wait_for_work(timeout_s=1.0)
        engine.step()
        num_steps += 1
    assert num_steps > 1


def test_the_host_cache_keeps_adapters_of_requests_that_have_begun(
    make_engine: Callable[..., Engine], root: Path, tmp_path: Path
) -> None:
    """A preempted request resumes, though its adapter's file was overwritten and others need the memory."""
    shutil.copytree(root / "a", tmp_path / "begun")
    lora = LoRAConfig(max_loras=1, max_cpu_loras=2)
    engine = make_engine(lora=lora, max_num_seqs=1, kv_cache_memory_bytes=None)
    begun = engine.register_adapter(str(tmp_path / "begun")).digest
    others = digests_of(engine, root, "b", "c", "one", "two")
    options = dataclasses.replace(GREEDY, max_tokens=12)
    results = {"alone": Result()}
    engine.submit(GenerateRequest("alone", (5, 6), options, begun))
    run(engine, results)
    expected = results["alone"].token_ids

    results = {"begun": Result()}
    engine.submit(GenerateRequest("begun", (5, 6), options, begun))
    while len(results["begun"].token_ids) < 3:
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)
    (running,) = engine._scheduler._running
    engine._scheduler._running.preempt(running)
    engine._slots.drop(begun)  # another adapter needs it
    (tmp_path / "begun" / "adapter_model.safetensors").write_bytes(b"")
    for digest in others:
        results[digest] = Result()
        engine.submit(GenerateRequest(digest, (5, 6), GREEDY, digest, priority=-1))
    while any(results[digest].finish is None for digest in others):
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)
        assert results["begun"].finish is None
        assert begun in engine._store.resident()
    run(engine, results)
    assert results["begun"].error is None and results["begun"].token_ids == expected
