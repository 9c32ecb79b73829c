"""Which version of an op runs: Triton's on a GPU, C++'s on a CPU (native.py), else the reference in torch.

Each op's file has its equation, shapes, checks and reference; kernels/gpu/ has the Triton version under the same name,
kernels/cpu/ the C++ one. Triton comes with torch's CUDA builds and is imported only when it is to run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from lorafleet.kernels import native
from lorafleet.kernels.build import Level

# Read once: every call of an op asks.
_is_triton_wanted = os.environ.get("LORAFLEET_NATIVE_KERNELS") != "0"
_is_triton_forced: bool | None = None  # None: the device decides


def uses_triton(device: torch.device) -> bool:
    """Whether ops on tensors of this device run in Triton."""
    if _is_triton_forced is None:
        return device.type == "cuda" and _is_triton_wanted
    return _is_triton_forced


@contextmanager
def forced(version: Level | Literal["triton"] | None) -> Iterator[None]:
    """Run that level's C++ kernels, Triton's, or the references (None), within this block and in all threads.

    For tests. What Triton has no kernel for runs as the reference then. On a CPU, Triton runs in its interpreter, which
    TRITON_INTERPRET=1 must have chosen before it was imported.
    """
    global _is_triton_forced
    kept, _is_triton_forced = _is_triton_forced, version == "triton"
    try:
        with native.forced(None if version == "triton" else version):
            yield
    finally:
        _is_triton_forced = kept
