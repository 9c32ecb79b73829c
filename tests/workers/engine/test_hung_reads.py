"""Adapters whose files hang: their requests fail, all others continue, and the engine can be closed."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import tiny
from tiny import Result, gather

from lorafleet.workers.adapters import open_files
from lorafleet.workers.adapters.format import AdapterSpec, HostAdapter
from lorafleet.workers.adapters.open_files import OpenAdapter
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import AdapterUnavailableError, DrainingError, status_of
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

GREEDY = SamplingOptions(max_tokens=4, temperature=0.0, ignore_eos=True)
HUNG = [f"hung{n}" for n in range(5)]  # more than there are reader threads
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hung")
    model = tiny.make_model("smollm2", root / "model")
    tiny.make_adapters(model, root, [*HUNG, "fine"], targets=["q_proj"])
    return root


class Disk:
    """Reads of some adapters that do not end before `answers` is set."""

    def __init__(self, engine: Engine, root: Path) -> None:
        self.engine = engine
        self.answers = threading.Event()
        self.digests = {name: engine.register_adapter(str(root / name)).digest for name in [*HUNG, "fine"]}
        self.num_reads = 0
        self._hung = {self.digests[name] for name in HUNG}
        self._load = engine._store._load
        engine._store._load = self.load

    def load(self, spec: AdapterSpec, *rest: object) -> HostAdapter:
        self.num_reads += 1
        if spec.digest in self._hung:
            assert self.answers.wait(TIMEOUT_S)
        return self._load(spec, *rest)

    def request(self, request_id: str, name: str | None) -> GenerateRequest:
        return GenerateRequest(request_id, (5, 6), GREEDY, None if name is None else self.digests[name])

    def submit(self, results: dict[str, Result], **names: str | None) -> None:
        for request_id, name in names.items():
            results[request_id] = Result()
            self.engine.submit(self.request(request_id, name))

    def run(self, results: dict[str, Result], until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not until():
            assert time.monotonic() < deadline
            if self.engine.wait_for_work(timeout_s=0.2):
                gather(self.engine.step(), results)


@pytest.fixture
def make_disk(root: Path) -> Iterator[Callable[..., Disk]]:
    disks: list[Disk] = []

    def make(**changes: object) -> Disk:
        config = EngineConfig(model=str(root / "model"), dtype="float32", num_threads=1, max_adapter_wait_s=0.0)
        config = dataclasses.replace(config, lora=LoRAConfig(max_loras=8), kv_cache_memory_bytes=4_000_000)
        engine = Engine.from_config(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
        engine.load()
        engine.bind_thread()
        disks.append(Disk(engine, root))
        return disks[-1]

    yield make
    for disk in disks:
        disk.answers.set()
        disk.engine.close()


def test_other_adapters_and_the_base_model_go_on_while_more_reads_hang_than_there_are_threads(
    make_disk: Callable[..., Disk],
) -> None:
    disk = make_disk()
    results: dict[str, Result] = {}
    disk.submit(results, **{name: name for name in HUNG})
    disk.run(results, lambda: disk.num_reads >= 4)
    disk.submit(results, fine="fine", base=None)
    disk.run(results, lambda: bool(results["fine"].finish and results["base"].finish))
    assert results["fine"].finish is results["base"].finish is FinishReason.LENGTH
    assert not any(results[name].finish for name in HUNG)
    disk.answers.set()
    disk.run(results, lambda: not disk.engine.has_unfinished())
    assert all(results[name].finish is FinishReason.LENGTH for name in HUNG), "the disk is back"


def test_requests_for_what_hangs_end_with_a_named_error_and_later_ones_at_once(make_disk: Callable[..., Disk]) -> None:
    disk = make_disk(adapter_read_timeout_s=0.3)
    results: dict[str, Result] = {}
    disk.submit(results, one="hung0", two="hung0", base=None)
    disk.run(results, lambda: not disk.engine.has_unfinished())
    for request_id in ("one", "two"):
        error = results[request_id].error
        assert isinstance(error, AdapterUnavailableError) and "given up" in error.message
        assert status_of(error).http == 503 and error.retry_after_s
    assert results["base"].finish is FinishReason.LENGTH
    disk.submit(results, late="hung0")
    disk.run(results, lambda: not disk.engine.has_unfinished())
    assert isinstance(results["late"].error, AdapterUnavailableError)
    assert disk.num_reads == 1, "it hangs still, so it is not tried again"
    disk.engine.check_integrity()
    disk.answers.set()


def test_an_adapter_whose_read_hangs_can_be_unregistered(make_disk: Callable[..., Disk]) -> None:
    disk = make_disk(adapter_read_timeout_s=0.3)
    results: dict[str, Result] = {}
    disk.submit(results, one="hung0")
    disk.run(results, lambda: disk.num_reads > 0)
    freed = disk.engine.unregister_adapter(disk.digests["hung0"])
    disk.run(results, freed.done)
    assert freed.result(0).host == 0 and isinstance(results["one"].error, AdapterUnavailableError)


def test_closing_does_not_wait_for_what_hangs(make_disk: Callable[..., Disk]) -> None:
    disk = make_disk()
    results: dict[str, Result] = {}
    disk.submit(results, **{name: name for name in HUNG})
    disk.run(results, lambda: disk.num_reads >= 4)
    freed = disk.engine.unregister_adapter(disk.digests["hung0"])
    closer = threading.Thread(target=disk.engine.close, daemon=True)
    closer.start()
    closer.join(TIMEOUT_S)
    assert not closer.is_alive() and not disk.answers.is_set()
    assert isinstance(freed.exception(0), DrainingError)
    for ask in (
        lambda: disk.engine.submit(disk.request("late", None)),
        lambda: disk.engine.pin_adapter(disk.digests["fine"]),
        lambda: disk.engine.unregister_adapter(disk.digests["fine"]),
        disk.engine.step,
    ):
        with pytest.raises(DrainingError, match="closed"):
            ask()
    disk.engine.close()


def test_no_caller_on_an_event_loop_waits_for_files_to_open(
    make_disk: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, may_open = make_disk(), threading.Event()
    disk.answers.set()
    open_first = open_files._open_first

    def slowly(specs: Sequence[AdapterSpec]) -> OpenAdapter | None:
        assert may_open.wait(TIMEOUT_S)
        return open_first(specs)

    monkeypatch.setattr(open_files, "_open_first", slowly)
    results = {"fine": Result(), "base": Result()}
    disk.engine.submit(disk.request("fine", "fine"), waits_for_files=False)
    disk.engine.submit(disk.request("base", None), waits_for_files=False)
    disk.run(results, lambda: results["base"].finish is not None)
    assert results["fine"].finish is None
    may_open.set()
    disk.run(results, lambda: results["fine"].finish is not None)
    assert results["fine"].finish is FinishReason.LENGTH
