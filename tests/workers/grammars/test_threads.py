"""Threads for grammars have deep stacks, and other threads theirs."""

from __future__ import annotations

import ctypes
import threading

from lorafleet.workers.grammars.check_process import STACK_BYTES as CHECKED_STACK_BYTES
from lorafleet.workers.grammars.threads import STACK_BYTES, grammar_threads


def stack_bytes() -> int:
    """Return the size of the calling thread's stack."""
    library = ctypes.CDLL(None)
    library.pthread_self.restype = ctypes.c_ulong
    attributes, size = ctypes.create_string_buffer(128), ctypes.c_size_t()
    assert library.pthread_getattr_np(ctypes.c_ulong(library.pthread_self()), attributes) == 0
    assert library.pthread_attr_getstacksize(attributes, ctypes.byref(size)) == 0
    library.pthread_attr_destroy(attributes)
    return size.value


def test_all_of_a_pools_threads_have_a_deep_stack_and_others_keep_theirs() -> None:
    before = threading.stack_size()
    pool = grammar_threads(3, "deep")
    together = threading.Barrier(3)

    def size() -> int:
        together.wait()
        return stack_bytes()

    sizes = [future.result() for future in [pool.submit(size) for _ in range(3)]]
    pool.shutdown()
    assert min(sizes) >= STACK_BYTES >= 4 * CHECKED_STACK_BYTES
    assert threading.stack_size() == before
