"""Adapters are loaded and unloaded while the engine runs: answers do not change, and removed adapters are freed."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from tiny import Result, gather

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.aliases import Aliases
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.registered import FreedBytes
from lorafleet.workers.errors import AdapterConflictError, AdapterUnavailableError, UnknownModelError
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

GREEDY = SamplingOptions(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPT = (5, 6, 7)
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters a, b, c."""
    root = tmp_path_factory.mktemp("life")
    model = tiny.make_model("smollm2", root / "model")
    tiny.make_adapters(model, root, NAMES)
    return root


@pytest.fixture
def engine(root: Path) -> Iterator[Engine]:
    config = EngineConfig(model=str(root / "model"), dtype="float32", lora=LoRAConfig(max_loras=2), num_threads=1)
    engine = Engine.from_config(config)
    engine.load()
    engine.bind_thread()
    yield engine
    assert not engine.has_unfinished()
    engine.check_integrity()
    assert engine._store.num_open_files == 0
    engine.close()


def run(engine: Engine, results: dict[str, Result]) -> None:
    while engine.has_unfinished():
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)
        engine.check_integrity()


def answer(engine: Engine, digest: str | None) -> list[int]:
    results = {"one": Result()}
    engine.submit(GenerateRequest("one", PROMPT, GREEDY, digest))
    run(engine, results)
    return results["one"].token_ids


def start(engine: Engine, request_id: str, digest: str, results: dict[str, Result]) -> None:
    """Submit a request and step until it runs."""
    results[request_id] = Result()
    engine.submit(GenerateRequest(request_id, PROMPT, GREEDY, digest))
    while not results[request_id].token_ids:
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)


def test_unregistering_waits_for_the_requests_then_frees_slot_and_host_memory(engine: Engine, root: Path) -> None:
    spec = engine.register_adapter(str(root / "a"))
    expected = answer(engine, spec.digest)
    results: dict[str, Result] = {}
    start(engine, "running", spec.digest, results)
    results["queued"] = Result()
    engine.submit(GenerateRequest("queued", PROMPT, GREEDY, spec.digest))
    freed = engine.unregister_adapter(spec.digest)
    with pytest.raises(AdapterUnavailableError, match="registered here"):
        engine.submit(GenerateRequest("late", PROMPT, GREEDY, spec.digest))
    gather(engine.step(), results)
    assert not freed.done()
    run(engine, results)
    assert results["running"].token_ids == results["queued"].token_ids == expected
    assert freed.result(0) == FreedBytes(engine.memory.slot_bytes, spec.num_bytes(torch.float32))
    assert engine.stats().device_adapters == engine.stats().host_adapters == ()
    assert engine.stats().host_cache_bytes == 0


def replace_files(directory: Path, other: Path) -> None:
    for file in other.iterdir():
        shutil.copy(file, directory / "new")
        (directory / "new").replace(directory / file.name)


@pytest.mark.parametrize("change", [replace_files, lambda directory, _: shutil.rmtree(directory)])
def test_a_request_that_was_accepted_has_its_adapter_whatever_is_put_in_its_place(
    change: Callable[[Path, Path], None], engine: Engine, root: Path, tmp_path: Path
) -> None:
    expected = answer(engine, engine.register_adapter(str(root / "a")).digest)
    shutil.copytree(root / "b", tmp_path / "b")
    replace_files(tmp_path / "b", root / "a")
    engine.unregister_adapter(engine.register_adapter(str(root / "a")).digest)
    engine.step()
    digest = engine.register_adapter(str(tmp_path / "b")).digest
    assert engine.stats().host_adapters == engine.stats().device_adapters == ()
    results = {"one": Result(), "two": Result()}
    engine.submit(GenerateRequest("one", PROMPT, GREEDY, digest))
    engine.submit(GenerateRequest("two", PROMPT, GREEDY, digest))
    change(tmp_path / "b", root / "c")
    run(engine, results)
    assert results["one"].token_ids == results["two"].token_ids == expected


def test_an_idle_engine_frees_at_its_next_step(engine: Engine, root: Path) -> None:
    digest = engine.register_adapter(str(root / "a")).digest
    answer(engine, digest)
    freed = engine.unregister_adapter(digest)
    assert engine.wait_for_work(timeout_s=0)
    engine.step()
    assert freed.result(0).device > 0
    with pytest.raises(UnknownModelError):
        engine.unregister_adapter(digest)


def test_one_that_was_never_used_frees_nothing(engine: Engine, root: Path) -> None:
    freed = engine.unregister_adapter(engine.register_adapter(str(root / "a")).digest)
    engine.step()
    assert freed.result(0) == FreedBytes(0, 0)


def test_registered_again_before_it_is_free_it_stays(engine: Engine, root: Path) -> None:
    digest = engine.register_adapter(str(root / "a")).digest
    expected = answer(engine, digest)
    results: dict[str, Result] = {}
    start(engine, "running", digest, results)
    first = engine.unregister_adapter(digest)
    engine.register_adapter(str(root / "a"))
    run(engine, results)
    assert first.result(0) == FreedBytes(0, 0)
    assert answer(engine, digest) == expected
    assert engine.stats().num_slot_loads == 1


def test_unregistered_while_it_loads_the_request_still_ends_and_nothing_stays(engine: Engine, root: Path) -> None:
    digest = engine.register_adapter(str(root / "a")).digest
    results = {"one": Result()}
    engine.submit(GenerateRequest("one", PROMPT, GREEDY, digest))
    gather(engine.step(), results)  # starts the load
    freed = engine.unregister_adapter(digest)
    engine.cancel("one")
    run(engine, results)
    while not freed.done():
        engine.wait_for_work(timeout_s=1.0)
        engine.step()
    assert results["one"].finish is FinishReason.CANCELLED
    assert engine.stats().device_adapters == engine.stats().host_adapters == ()


def test_closing_ends_the_wait_for_what_was_not_freed(root: Path) -> None:
    config = EngineConfig(model=str(root / "model"), dtype="float32", lora=LoRAConfig(), num_threads=1)
    engine = Engine.from_config(config)
    freed = engine.unregister_adapter(engine.register_adapter(str(root / "a")).digest)
    engine.close()
    with pytest.raises(Exception, match="closed"):
        freed.result(0)


def test_an_adapter_is_freed_with_its_last_alias(engine: Engine, root: Path) -> None:
    aliases: Aliases[str] = Aliases(engine)
    spec = aliases.add("x", str(root / "a")).result()
    assert aliases.add("y", str(root / "a")).result() == spec
    answer(engine, spec.digest)
    assert aliases.remove("x").result() is None
    freed = aliases.remove("y").result()
    assert freed is not None
    engine.step()
    assert freed.result(0).host > 0
    with pytest.raises(UnknownModelError, match="'y'"):
        aliases.remove("y").result()
    aliases.close()


def test_an_alias_given_anew_lets_the_old_adapter_go(engine: Engine, root: Path) -> None:
    aliases: Aliases[str] = Aliases(engine)
    old = aliases.add("x", str(root / "a")).result()
    before = answer(engine, old.digest)
    new = aliases.add("x", str(root / "b")).result()
    assert answer(engine, new.digest) != before
    assert engine.stats().device_adapters == (new.digest,)
    with pytest.raises(AdapterUnavailableError):
        engine.submit(GenerateRequest("late", PROMPT, GREEDY, old.digest))
    aliases.close()


def test_a_pinned_adapter_is_in_a_slot_before_it_is_asked_for_and_stays_there(engine: Engine, root: Path) -> None:
    specs = [engine.register_adapter(str(root / name)) for name in NAMES]
    pinned = specs[0].digest
    engine.pin_adapter(pinned)
    engine.pin_adapter(pinned)
    while not engine.stats().device_adapters:
        assert engine.wait_for_work(timeout_s=10.0)
        engine.step()
    for spec in specs[1:] * 3:
        answer(engine, spec.digest)
        assert pinned in engine.stats().device_adapters
    with pytest.raises(AdapterConflictError, match="1 of 2 slots hold pinned adapters; the limit is 1"):
        engine.pin_adapter(specs[1].digest)
    freed = engine.unregister_adapter(pinned)
    engine.step()
    assert freed.result(0).device > 0
    engine.pin_adapter(specs[1].digest)
    with pytest.raises(AdapterUnavailableError):
        engine.pin_adapter(pinned)


def test_two_thousand_lives_leave_nothing_behind(engine: Engine, root: Path) -> None:
    """Load, use or abort, unload, with three adapters and two slots; memory and references do not grow."""

    def live(cycle: int) -> None:
        spec = engine.register_adapter(str(root / NAMES[cycle % 3]))
        results = {"used": Result(), "aborted": Result()}
        for request_id in results:
            options = GREEDY if request_id == "aborted" else SamplingOptions(max_tokens=1 + cycle % 2, temperature=0.0)
            engine.submit(GenerateRequest(request_id, PROMPT, options, spec.digest))
        for _ in range(cycle % 4):  # aborted while it waits, loads, or runs
            gather(engine.step(), results)
        engine.cancel("aborted")
        freed = engine.unregister_adapter(spec.digest)
        while engine.has_unfinished() or not freed.done():
            engine.wait_for_work(timeout_s=1.0)
            gather(engine.step(), results)
        assert results["used"].finish in (FinishReason.LENGTH, FinishReason.STOP)
        assert results["aborted"].finish is not None

    def memory() -> tuple[int, int]:
        gc.collect()
        num_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return num_pages * os.sysconf("SC_PAGE_SIZE"), len(gc.get_objects())

    for cycle in range(200):
        live(cycle)
    bytes_before, objects_before = memory()
    for cycle in range(2000):
        live(cycle)
        if cycle % 100 == 0:
            engine.check_integrity()
            engine._store.check_integrity()
    bytes_after, objects_after = memory()
    stats = engine.stats()
    assert stats.device_adapters == stats.host_adapters == ()
    assert (stats.host_cache_bytes, stats.num_free_pages) == (0, stats.num_pages)
    assert engine._store.stats().num_registered == 0
    assert abs(objects_after - objects_before) < 100
    assert bytes_after - bytes_before < 8 << 20


def test_requests_and_output_tokens_are_counted_for_each_adapter_until_it_goes(engine: Engine, root: Path) -> None:
    first, second = (engine.register_adapter(str(root / name)).digest for name in "ab")
    results: dict[str, Result] = {"base": Result(), "both": Result()}
    start(engine, "one", first, results)
    engine.submit(GenerateRequest("base", PROMPT, GREEDY, None))
    engine.submit(GenerateRequest("both", PROMPT, GREEDY, composition=((first, 0.5), (second, 0.5))))
    assert engine.stats().requests_of == {first: 2, second: 1, "": 1}
    run(engine, results)
    stats = engine.stats()
    assert stats.requests_of == {}
    assert stats.output_tokens_of == {first: 16, second: 8, "": 8}
    assert stats.num_output_tokens == 24, "a composition's tokens count for each of its adapters"
    freed = engine.unregister_adapter(first)
    while not freed.done():
        engine.step()
    assert engine.stats().output_tokens_of == {second: 8, "": 8}
