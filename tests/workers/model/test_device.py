"""Where the engine computes, in which dtype, and what memory it finds there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from lorafleet.workers.config import EngineConfig
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.model import device as device_module
from lorafleet.workers.model.architecture import read_model_spec
from lorafleet.workers.model.device import measure_memory, pick_device, pick_dtype

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


@pytest.mark.parametrize(
    ("asked", "quantization", "checkpoint", "device", "dtype"),
    [
        ("auto", None, "bfloat16", CPU, "bfloat16"),
        ("auto", None, "float32", CPU, "float32"),
        ("auto", None, "float16", CPU, "bfloat16"),
        ("auto", None, "float16", CUDA, "float16"),
        ("auto", None, "float8_e4m3fn", CUDA, "bfloat16"),
        ("auto", "int8", "float32", CPU, "bfloat16"),
        ("float32", None, "bfloat16", CPU, "float32"),
    ],
)
def test_auto_is_the_checkpoints_dtype_if_the_device_computes_in_it(
    asked: str, quantization: str | None, checkpoint: str, device: torch.device, dtype: str, tmp_path: Path
) -> None:
    tiny.make_model("smollm2", tmp_path)
    spec = replace(read_model_spec(tmp_path), dtype=checkpoint)
    assert pick_dtype(EngineConfig("m", dtype=asked, quantization=quantization), spec, device) == dtype


@pytest.mark.parametrize(("limit", "used"), [(1 << 20, 1 << 18), (1 << 20, 1 << 21), (1 << 20, None)])
def test_a_containers_limit_bounds_the_hosts_memory(
    limit: int, used: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "_cgroup_bytes", {"memory.max": limit, "memory.current": used}.get)
    memory = measure_memory(CPU)
    assert memory.is_cpu and memory.total_bytes == limit
    assert memory.available_bytes == max(0, limit - (used or 0))


def test_without_a_limit_the_memory_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_cgroup_bytes", lambda name: None)
    memory = measure_memory(CPU)
    assert 0 < memory.available_bytes <= memory.total_bytes
