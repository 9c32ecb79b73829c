"""Dispatch of ops: Triton on a GPU, C++ on a CPU (native.py), else the reference in torch.

Each op's file has its equation, shapes, checks and reference; kernels/gpu/ has the Triton version under the same name,
kernels/cpu/ the C++ one. Triton comes with torch's CUDA builds and is imported only when needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from lorafleet.kernels import native
from lorafleet.kernels.build import Level

# Read once, since every call of an op asks.
_is_triton_wanted = os.environ.get("LORAFLEET_NATIVE_KERNELS") != "0"
_is_triton_forced: bool | None = None  # None: the device decides


def uses_triton(device: torch.device) -> bool:
    """Return whether ops on tensors of this device run in Triton."""
    if _is_triton_forced is None:
        return device.type == "cuda" and _is_triton_wanted
    return _is_triton_forced


@contextmanager
def forced(version: Level | Literal["triton"] | None) -> Iterator[None]:
    """Use a level's C++ kernels, Triton's, or the references (None) within this block, in all threads.

    For tests. Ops without a Triton kernel then run as the reference. On a CPU, Triton runs in its interpreter, for
    which TRITON_INTERPRET=1 must be set before triton is imported.
    """
    global _is_triton_forced
    kept, _is_triton_forced = _is_triton_forced, version == "triton"
    try:
        with native.forced(None if version == "triton" else version):
            yield
    finally:
        _is_triton_forced = kept
