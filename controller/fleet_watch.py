"""What the launcher does while the fleet serves: prints what happens to it, and has its workers restarted.

Owns: asking the controller for both without ever waiting for it. Leaves to others: signals (launch.py), what happens
(the controller's events.py), restarting (actor.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

_LOOK_S = 0.5


class Controller(Protocol):
    """What is asked of fleet_cluster.py's `FleetCluster`."""

    def poll(self, method: str, *args: object, timeout_s: float) -> Any: ...


class FleetWatch:
    """Call `look` again and again."""

    def __init__(self, controller: Controller, last_event: int, say: Callable[[str], None]) -> None:
        self._controller = controller
        self._last_event = last_event
        self._say = say
        self._restarting = False
        self._looked_at = 0.0
        self._has_failed = False  # the controller did not answer the last time

    def look(self, *, wants_restart: bool) -> bool:
        """Print what is new. wants_restart: whether a restart of the workers is to begin; whether it has, now."""
        if time.monotonic() - self._looked_at < _LOOK_S:
            return False
        self._looked_at = time.monotonic()
        begins = wants_restart and not self._restarting
        if begins:
            self._restarting = True
            self._say("restarting the workers, one after the other ...")
        try:
            for number, line in self._controller.poll("events", self._last_event, timeout_s=0.0) or ():
                self._last_event = number
                self._say(line)
            if self._restarting and (answer := self._controller.poll("restart_workers", timeout_s=0.0)) is not None:
                self._restarting = False
                self._say(answer.text)
            self._has_failed = False
        except RuntimeError as error:  # gateways and workers serve without it
            if not self._has_failed:
                self._say(str(error))
            self._has_failed = True
        return begins
