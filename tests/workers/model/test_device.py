"""The device that an engine computes on, and its memory."""

from __future__ import annotations

import pytest
import torch

from lorafleet.workers import host_memory
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.model.device import measure_memory, pick_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("is_there", [False, True])
def test_auto_is_a_gpu_where_torch_sees_one(is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    assert pick_device(EngineConfig("m", device="auto")) == (CUDA if is_there else CPU)
    assert pick_device(EngineConfig("m", device="cpu")) == CPU


def test_a_gpu_that_is_asked_for_and_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--device is cuda, .* Use --device cpu"):
        pick_device(EngineConfig("m", device="cuda"))


@pytest.mark.parametrize(("limit", "used"), [(1 << 20, 1 << 18), (1 << 20, 1 << 21), (1 << 20, None)])
def test_a_containers_limit_bounds_the_hosts_memory(
    limit: int, used: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "_cgroup_bytes", {"memory.max": limit, "memory.current": used}.get)
    memory = measure_memory(CPU)
    assert memory.is_cpu and memory.total_bytes == limit
    assert memory.available_bytes == max(0, limit - (used or 0))


def test_without_a_limit_the_memory_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_cgroup_bytes", lambda name: None)
    memory = measure_memory(CPU)
    assert 0 < memory.available_bytes <= memory.total_bytes
