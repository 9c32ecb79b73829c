"""This machine's resources: the device to compute on, its memory, and the dtype to compute in."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lorafleet.workers.config import EngineConfig
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.model.architecture import ModelSpec
from lorafleet.workers.model.memory_plan import DeviceMemory


def pick_device(config: EngineConfig) -> torch.device:
    """Resolve `--device`. Raises `ConfigError` if CUDA is requested but absent."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch sees no CUDA device here. Use --device cpu.")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def pick_dtype(config: EngineConfig, spec: ModelSpec, device: torch.device) -> str:
    """Resolve `--dtype`; auto is the checkpoint's dtype, but bfloat16 instead of float16 on a CPU."""
    if config.dtype != "auto":
        return config.dtype
    if config.quantization:
        return "bfloat16"
    if spec.dtype == "float16" and device.type == "cpu":
        return "bfloat16"
    return spec.dtype if spec.dtype in ("float32", "bfloat16", "float16") else "bfloat16"


def measure_memory(device: torch.device) -> DeviceMemory:
    """Return total and free memory, within the container's limit if there is one."""
    total, available = _host_memory()
    if device.type == "cpu":
        return DeviceMemory(total, available, available, is_cpu=True)
    free, device_total = torch.cuda.mem_get_info(device)
    return DeviceMemory(device_total, free, available, is_cpu=False)


def _host_memory() -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    available = total
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None:
        total = min(total, limit)
        available = min(available, max(0, limit - (used or 0)))
    return total, available


def _cgroup_bytes(name: str) -> int | None:
    """Return a number of the cgroup (v2) that this process sees as its root; None if there is no limit."""
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
