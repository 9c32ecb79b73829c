"""Threads for what must not hold up the engine: reading, verifying, converting and copying adapters."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

# Measured with benchmarks/stalls.py on two busy cores: 0 lets a load take half of a core from a step, 19 makes it wait
# for seconds.
_NICE = 10


def background_threads(num_threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads give way to the engine's."""
    return ThreadPoolExecutor(num_threads, name, initializer=_give_way)


def _give_way() -> None:
    # Without OpenMP teams of their own: two teams that share the cores slow each other at every barrier.
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICE)
