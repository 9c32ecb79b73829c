"""The device to compute on, and its memory."""

from __future__ import annotations

import torch

from lorafleet.workers.config import EngineConfig
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.host_memory import host_memory
from lorafleet.workers.model.memory_plan import DeviceMemory


def pick_device(config: EngineConfig) -> torch.device:
    """Resolve `--device`. Raises `ConfigError` if CUDA is requested but absent."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch sees no CUDA device here. Use --device cpu.")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def measure_memory(device: torch.device) -> DeviceMemory:
    """Total and free memory, within the container's limit where there is one."""
    total, available = host_memory()
    if device.type == "cpu":
        return DeviceMemory(total, available, available, is_cpu=True)
    free, device_total = torch.cuda.mem_get_info(device)
    return DeviceMemory(device_total, free, available, is_cpu=False)
