"""The cores and priority of an engine's thread."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

from lorafleet.workers import cores
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.thread import EngineThread


@pytest.mark.parametrize(("workers_per_host", "pinned"), [(1, []), (2, [(0, 1), (2, 3)])])
def test_engines_that_share_a_host_compute_on_cores_of_their_own(
    workers_per_host: int, pinned: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def pin(pid: int, own: Sequence[int]) -> None:
        asked.append(tuple(own))

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)))
    monkeypatch.setattr(os, "sched_setaffinity", pin)
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    tiny.make_model("smollm2", tmp_path / "model")
    config = EngineConfig(str(tmp_path / "model"), device="cpu", workers_per_host=workers_per_host)
    engines = []
    for _ in range(2):
        engine = Engine.from_config(config)
        engine.load()
        engines.append(engine)
        thread = EngineThread(engine, lambda step, events: None, lambda error: None)
        thread.start()
        thread.stop()
    assert asked == pinned
    for engine in engines:
        engine.close()
    again = cores.claim_cores(2)
    assert again.cores == (0, 1), "they are free again"
    again.close()
