"""`lorafleet up` and fleets that fail to start: which it ends, and which it leaves. Ray is replaced."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

import pytest

from lorafleet.controller.commands.ray_cluster import FleetCluster
from lorafleet.controller.commands.signals import Signals, Stopped
from lorafleet.controller.commands.up import _start
from lorafleet.controller.config import ServeConfig
from lorafleet.controller.fleet.actor import FleetReady
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.errors import ConfigError, NoRoomError
from lorafleet.workers.server.actor import WorkerFailed

READY = FleetReady((), 0, "10.0.0.1:50050")


class FakeCluster:
    def __init__(self, answer: Any, *, has_fleet: bool, was_told: bool = True) -> None:
        self.has_fleet = has_fleet
        self.answers = {"ready": answer, "was_told": was_told}
        self.has_ended = False

    def find_controller(self) -> bool:
        return self.has_fleet

    def create_controller(self, actor: type, *args: object, **options: object) -> None:
        self.has_fleet = True

    def poll(self, method: str, *args: object, timeout_s: float) -> Any:
        answer = self.answers[method]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def dead_processes(self) -> list[str]:
        return []

    def ask_if_it_lives(self) -> Future[str]:
        return Future()

    def end_found_fleet(self) -> int:
        self.has_ended = True
        return 1


def start(cluster: FakeCluster, signals: Signals | None = None) -> FleetReady:
    config = ServeConfig(EngineConfig("/model"), ("base",))
    return _start(
        cast(FleetCluster, cluster),
        signals or Signals(),
        config,
        controller_port=50050,
        token="token",
        gateways_on="head",
    )


@pytest.mark.parametrize("has_fleet", [True, False])
def test_a_fleet_that_serves_is_left(has_fleet: bool) -> None:
    cluster = FakeCluster(READY, has_fleet=has_fleet)
    assert start(cluster) == READY
    assert not cluster.has_ended


@pytest.mark.parametrize("has_fleet", [True, False])
def test_one_that_cannot_start_is_ended_even_if_an_earlier_command_created_it(has_fleet: bool) -> None:
    cluster = FakeCluster(WorkerFailed("no_room", "no room"), has_fleet=has_fleet)
    with pytest.raises(NoRoomError):
        start(cluster)
    assert cluster.has_ended


@pytest.mark.parametrize("has_fleet", [True, False])
@pytest.mark.parametrize("interruption", ["a signal", "the controller is lost"])
def test_an_interruption_ends_what_this_command_has_started(has_fleet: bool, interruption: str) -> None:
    signals = Signals()
    cluster = FakeCluster(RuntimeError("The controller died."), has_fleet=has_fleet)
    signals.count = int(interruption == "a signal")
    with pytest.raises((Stopped, RuntimeError)):
        start(cluster, signals)
    assert cluster.has_ended is not has_fleet


def test_one_with_other_flags_is_left() -> None:
    cluster = FakeCluster(READY, has_fleet=True, was_told=False)
    with pytest.raises(ConfigError, match="other flags"):
        start(cluster)
    assert not cluster.has_ended
