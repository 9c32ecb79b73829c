"""Signs of life over a pipe: their reader kills the process when they stop, since a hung process cannot end itself.

Owns: both ends. Leaves to others: the end of a silent process (fleet/gateway_processes.py, fleet/watchdog.py).
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

BEAT_S: Final = 1.0
_MAX_KEPT = 4096  # bytes
_MAX_STEP_S = 1.0  # the most that counts between two looks; more means that the reader itself did not run


def beat(descriptor: int) -> None:
    """Write one sign. Call it every `BEAT_S` on the thread whose life it shows."""
    os.set_blocking(descriptor, False)
    with contextlib.suppress(OSError):  # the pipe is full, or closed; the reader's death is detected elsewhere
        os.write(descriptor, b"\n")


class Pulse:
    """The reader's end: how long the process has been silent, by the reader's own running time.

    So a machine that was suspended, or too busy for the reader to run, ends no process.
    """

    def __init__(self, descriptor: int, now: float) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._looked_at = now
        self._silent_s = 0.0
        self._has_beaten = False
        self._said = b""  # words written between the signs

    def look(self, now: float) -> float:
        """Read what has arrived. Return the seconds of silence."""
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
        """Return whether `word` was written between the signs."""
        return word in self._said
