"""Values that an engine's configuration derives from its host."""

from __future__ import annotations

import os

import pytest

from lorafleet.workers import cores
from lorafleet.workers.config import EngineConfig


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        ({}, 12),
        ({"tensor_parallel_size": 2}, 6),
        ({"workers_per_host": 3}, 4),
        ({"tensor_parallel_size": 2, "workers_per_host": 3}, 2),
        ({"workers_per_host": 24}, 1),
        ({"workers_per_host": 3, "num_threads": 7}, 7),
    ],
)
def test_all_ranks_of_a_host_share_its_cores(
    options: dict[str, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert EngineConfig("model", **options).threads == threads  # type: ignore[arg-type]
