"""Checks, without blocking, that a command's Ray cluster and its fleet are there.

Owns: reporting that it does not answer, deciding when it is lost. Leaves to others: Ray (ray_cluster.py), the reaction
(serve.py, up.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

FLEET_ENDED = "The fleet was ended by another command."
CHECK_S = 2.0
_MAX_STEP_S = 1.0
SILENT_S = 10.0
_RAYS_OWN = "RAY_gcs_rpc_server_reconnect_timeout_s"
AWAY_S = max(SILENT_S, float(os.environ.get(_RAYS_OWN, "60")) - 10.0)  # after which Ray's processes and ours exit


class Cluster(Protocol):
    """The part of ray_cluster.py's `FleetCluster` used here."""

    def dead_processes(self) -> Sequence[str]: ...
    def ask_if_it_lives(self) -> Future[str]: ...


class ClusterWatch:
    """The watch; call `look` repeatedly."""

    def __init__(self, cluster: Cluster, say: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._say = say
        self._now = now
        self._asked: Future[str] | None = None
        self._looked_at = self._answered_at = self._check_at = now()
        self._is_away = False  # silent, and reported so

    def look(self) -> str:
        """Return why the fleet can no longer serve, or an empty string."""
        now = self._now()
        self._answered_at += max(0.0, now - self._looked_at - _MAX_STEP_S)  # not counted: this command was stopped
        self._looked_at = now
        if dead := self._cluster.dead_processes():
            return f"Ray has failed: its {', its '.join(dead)}."
        if self._asked is None:
            if now >= self._check_at:
                self._check_at = now + CHECK_S
                self._asked = self._cluster.ask_if_it_lives()
        elif self._asked.done():
            asked, self._asked = self._asked, None
            if asked.exception() is None:
                return self._has_answered(asked.result(), now)
        silent_s = now - self._answered_at
        if silent_s > AWAY_S:
            return f"The Ray cluster has not answered for {AWAY_S:g} s."
        if silent_s > SILENT_S and not self._is_away:
            self._is_away = True
            self._say(f"the Ray cluster has not answered for {silent_s:.0f} s; gateways and workers keep serving")
        return ""

    def _has_answered(self, ailment: str, now: float) -> str:
        self._answered_at = now
        if self._is_away:
            self._is_away = False
            self._say("the Ray cluster answers again")
        return ailment
