"""Properties of the device that launches depend on."""

from __future__ import annotations

import functools

import torch

_INTERPRETED = 4  # few, so that small tests divide work too


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
