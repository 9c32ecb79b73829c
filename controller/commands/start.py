"""Waits for a fleet's start, in the command that started it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from lorafleet.controller.commands.cluster_watch import Cluster, ClusterWatch
from lorafleet.controller.commands.say import say
from lorafleet.controller.commands.signals import Signals
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.server.actor import WorkerFailed

if TYPE_CHECKING:
    from lorafleet.controller.fleet.actor import FleetReady

_TIMEOUT_S = 900.0
_POLL_S = 0.5


class Controller(Cluster, Protocol):
    """The part of ray_cluster.py's `FleetCluster` used here."""

    def poll(self, method: str, *args: object, timeout_s: float) -> Any: ...


def wait_for_fleet(controller: Controller, signals: Signals) -> FleetReady | WorkerFailed:
    """Wait until all workers serve, or one cannot. Raises `Stopped` on a signal, `ConfigError` when Ray is lost."""
    deadline = time.monotonic() + _TIMEOUT_S
    ray = ClusterWatch(controller, say)
    while time.monotonic() < deadline:
        signals.check()
        if lost := ray.look():
            raise ConfigError(lost)
        answer: FleetReady | WorkerFailed | None = controller.poll("ready", timeout_s=_POLL_S)
        if answer is not None:
            return answer
    raise ConfigError(f"The fleet did not start within {_TIMEOUT_S:g} s.")
