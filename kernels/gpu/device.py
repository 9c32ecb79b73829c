"""What the launches need to know of the device."""

from __future__ import annotations

import functools

import torch

_INTERPRETED = 4  # so few that tests, which are small, see work divided


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
