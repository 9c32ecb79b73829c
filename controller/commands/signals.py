"""What signals asked of a command that stays: its end, and a restart of the workers."""

from __future__ import annotations

import signal
from types import FrameType


class Stopped(Exception):
    """A signal asked for the end."""


class Signals:
    """How often SIGINT, SIGTERM and SIGHUP came: the first asks for the end, the second cuts a drain short. And how
    often SIGUSR1, which asks for a restart of the workers.

    They are only counted. Any lock, an Event's too, may be held by the very code that the next signal interrupts.
    """

    def __init__(self) -> None:
        self.count = 0
        self.num_restarts = 0

    def install(self) -> None:
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, self._handle)
        signal.signal(signal.SIGUSR1, self._handle_restart)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def _handle_restart(self, number: int, frame: FrameType | None) -> None:
        self.num_restarts += 1

    def check(self) -> None:
        if self.count:
            raise Stopped
