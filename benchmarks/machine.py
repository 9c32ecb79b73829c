"""Facts about the machine, and its speed in the two things that bound a model: reading memory, matrix products."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_ISA = ("avx", "amx", "fma", "f16c", "asimd", "sve", "bf16", "i8mm")


def facts() -> dict[str, Any]:
    """Return CPU, cores, instruction sets, memory and relevant versions."""
    info = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in reversed(info)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "platform": platform.platform(),
        "cpu": f"{fields.get('model name', platform.machine())}, family {fields.get('cpu family', '?')}, "
        f"model {fields.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)),
        "isa": sorted({flag for flag in flags if flag.startswith(_ISA)}),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def read_bytes_per_s() -> float:
    """Return the rate of reading memory that no cache holds, on all cores."""
    x = torch.ones(1 << 27, dtype=torch.float32)  # 512 MiB
    return x.nbytes / _median_s(x.sum)


def matmul_flop_per_s(size: int = 2048) -> float:
    """Return the rate of a large bfloat16 product, on all cores."""
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    return 2 * size**3 / _median_s(lambda: a @ b)


def _median_s(function: Callable[[], Any], *, repeat: int = 7) -> float:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        function()
        times = []
        for _ in range(repeat):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(num_threads)
    return statistics.median(times)
