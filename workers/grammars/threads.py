"""Threads that compile and follow grammars: with a stack several times that of the process that checked them."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import llguidance

STACK_BYTES: Final = 16 << 20
_lock = threading.Lock()


def grammar_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Return a pool whose threads are running already."""
    pool, barrier = ThreadPoolExecutor(count, thread_name_prefix=name), threading.Barrier(count + 1)
    with _lock:
        usual = threading.stack_size(STACK_BYTES)
        try:
            for _ in range(count):
                pool.submit(barrier.wait)
        finally:
            threading.stack_size(usual)
    barrier.wait()
    return pool


def mask_executor(count: int) -> llguidance.LLExecutor:
    """Return llguidance's own threads, which hold no Python lock."""
    os.environ.setdefault("RUST_MIN_STACK", str(STACK_BYTES))
    return llguidance.LLExecutor(count)
