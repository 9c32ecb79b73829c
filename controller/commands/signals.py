"""The signals to a running command: they stop it, or restart the workers."""

from __future__ import annotations

import signal
from types import FrameType


class Stopped(Exception):
    """A signal asked the command to stop."""


class Signals:
    """Counts of signals. The first SIGINT, SIGTERM or SIGHUP stops the command, the second ends its drain; SIGUSR1
    restarts the workers.

    Handlers only count: any lock, even an Event's, may be held by the code that the next signal interrupts.
    """

    def __init__(self) -> None:
        self.count = 0
        self.num_restarts = 0

    def install(self) -> None:
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
            signal.signal(signal.SIGHUP, self._handle)
        signal.signal(signal.SIGUSR1, self._handle_restart)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def _handle_restart(self, number: int, frame: FrameType | None) -> None:
        self.num_restarts += 1

    def check(self) -> None:
        if self.count:
            raise Stopped
