"""Measures time on the device, and its speed in the two things that bound a model: memory copies, matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_MAX_COUNT = 200  # runs of one sample


class Clock:
    """Measures consecutive runs on a device. On a CPU, in a dry run, it only counts."""

    def __init__(self, device: torch.device, *, sample_s: float = 0.15, num_samples: int = 5) -> None:
        """sample_s: approximate time of all runs of a sample."""
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._sample_s = sample_s
        self._num_samples = num_samples if self._is_cuda else 1

    def median_s(self, run: Callable[[], object]) -> float:
        """Return the seconds of one run in a sequence without gaps: the median of several samples."""
        count = self.count_for(run)
        return statistics.median(self.seconds(run, count) for _ in range(self._num_samples))

    def count_for(self, run: Callable[[], object]) -> int:
        """Warm up. Return the number of runs of a sample."""
        if not self._is_cuda:
            return 1
        self.seconds(run, 2)
        return max(3, min(_MAX_COUNT, round(self._sample_s / max(1e-6, self.seconds(run, 3)))))

    def seconds(self, run: Callable[[], object], count: int) -> float:
        """Return the mean seconds of `count` runs, from the device's start of the first to its end of the last."""
        if not self._is_cuda:
            began = time.perf_counter()
            for _ in range(count):
                run()
            return (time.perf_counter() - began) / count
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count


def copy_bytes_per_s(clock: Clock) -> float:
    """Return the rate of a copy within the device's memory, too large for its caches; counts reads and writes."""
    num_bytes = 4 << 30 if clock.device.type == "cuda" else 1 << 20
    source = torch.ones(num_bytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock.median_s(lambda: target.copy_(source))


def matmul_flop_per_s(clock: Clock) -> float:
    """Return the rate of a large bfloat16 product of random numbers."""
    size = 8192 if clock.device.type == "cuda" else 64
    a, b = (torch.empty(size, size, dtype=torch.bfloat16, device=clock.device).normal_() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / clock.median_s(lambda: torch.mm(a, b, out=out))
