"""A process's signs of life over a pipe, for whoever is to end it when they stop: a process that hangs cannot.

Owns: both ends. Leaves to others: what becomes of a silent process (fleet/gateway_processes.py, fleet/watchdog.py).
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

BEAT_S: Final = 1.0
_MAX_KEPT = 4096  # bytes
_MAX_STEP_S = 1.0  # between two looks that counts; a longer one means that the reader itself did not run


def beat(descriptor: int) -> None:
    """Write one. Call it each `BEAT_S` from what is to be seen alive."""
    os.set_blocking(descriptor, False)
    with contextlib.suppress(OSError):  # nobody reads, or has read; the reader's death is told in other ways
        os.write(descriptor, b"\n")


class Pulse:
    """The reader's end: how long it has been silent, by the reader's own running time.

    A machine that was suspended, or so busy that the reader did not run either, ends nobody.
    """

    def __init__(self, descriptor: int, now: float) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._looked_at = now
        self._silent_s = 0.0
        self._has_beaten = False
        self._said = b""  # what was written beside the signs

    def look(self, now: float) -> float:
        """Read what has come; seconds of silence."""
        self._silent_s += min(now - self._looked_at, _MAX_STEP_S)
        self._looked_at = now
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._descriptor, 4096):
                self._silent_s, self._has_beaten = 0.0, True
                self._said = (self._said + data.strip())[-_MAX_KEPT:]
        return self._silent_s

    @property
    def has_beaten(self) -> bool:
        return self._has_beaten

    def has_said(self, word: bytes) -> bool:
        """Whether this came between the signs."""
        return word in self._said
