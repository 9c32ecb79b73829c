"""A command's work while its fleet serves: printing events, and restarting workers on request.

Owns: asking the controller for both without blocking, and reporting that it does not answer. Leaves to others: signals
(serve.py, up.py), the events (fleet/events.py), the restart (fleet/actor.py), the cluster (cluster_watch.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

_LOOK_S = 0.5
_MAX_STEP_S = 1.0
SILENT_S = 5.0  # an answer comes every second


class Controller(Protocol):
    """The part of ray_cluster.py's `FleetCluster` used here."""

    def poll(self, method: str, *args: object, timeout_s: float) -> Any: ...


class FleetWatch:
    """The watch; call `look` repeatedly."""

    def __init__(
        self,
        controller: Controller,
        last_event: int,
        say: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._controller = controller
        self._last_event = last_event
        self._say = say
        self._now = now
        self._restarting = False
        self._looked_at = self._answered_at = now()
        self._is_away = False  # silent, and reported so

    def look(self, *, wants_restart: bool) -> bool:
        """Print new events. wants_restart: whether to restart the workers. Return whether a restart has begun now."""
        now = self._now()
        if now - self._looked_at < _LOOK_S:
            return False
        # Time in which this command was stopped does not count as silence.
        self._answered_at += max(0.0, now - self._looked_at - _MAX_STEP_S)
        self._looked_at = now
        begins = wants_restart and not self._restarting
        if begins:
            self._restarting = True
            self._say("restarting the workers, one after the other ...")
        try:
            events = self._controller.poll("events", self._last_event, timeout_s=0.0)
            if self._restarting and (answer := self._controller.poll("restart_workers", timeout_s=0.0)) is not None:
                self._restarting = False
                self._say(answer.text)
        except RuntimeError:  # the cluster's watch decides whether it is lost for good
            events = None
        if events is not None:
            self._answered_at = now
            if self._is_away:
                self._is_away = False
                self._say("the controller answers again")
            for number, line in events:
                self._last_event = number
                self._say(line)
        elif now - self._answered_at > SILENT_S and not self._is_away:
            self._is_away = True
            self._say(
                f"the controller has not answered for {now - self._answered_at:.0f} s; gateways and workers keep "
                "serving; Ray restarts it"
            )
        return begins
