"""What the launcher prints and asks for while the fleet serves."""

from __future__ import annotations

from typing import Any

import pytest

from lorafleet.controller import fleet_watch as module
from lorafleet.controller.actor import Outcome
from lorafleet.controller.fleet_watch import FleetWatch


class FakeController:
    """Answers what it is told to; None stands for an answer that takes longer."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"events": None, "restart_workers": None}
        self.asked: list[tuple[str, tuple[object, ...]]] = []

    def poll(self, method: str, *args: object, timeout_s: float) -> Any:
        assert timeout_s == 0.0
        self.asked.append((method, args))
        answer, self.answers[method] = self.answers[method], None
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.0)


def test_events_are_printed_once_and_asked_for_from_the_last_one_on() -> None:
    controller, said = FakeController(), list[str]()
    watch = FleetWatch(controller, 2, said.append)
    watch.look(wants_restart=False)
    controller.answers["events"] = [(3, "a worker is lost"), (4, "it is back")]
    watch.look(wants_restart=False)
    watch.look(wants_restart=False)
    assert said == ["a worker is lost", "it is back"]
    assert controller.asked == [("events", (2,)), ("events", (2,)), ("events", (4,))]


def test_a_restart_begins_once_and_says_what_came_of_it() -> None:
    controller, said = FakeController(), list[str]()
    watch = FleetWatch(controller, 0, said.append)
    assert watch.look(wants_restart=True)
    assert not watch.look(wants_restart=True), "one is under way"
    controller.answers["restart_workers"] = Outcome(True, "all 2 workers were restarted")
    watch.look(wants_restart=False)
    watch.look(wants_restart=False)
    assert said == ["restarting the workers, one after the other ...", "all 2 workers were restarted"]
    assert [method for method, _ in controller.asked].count("restart_workers") == 3


def test_a_controller_that_is_away_ends_nothing() -> None:
    controller, said = FakeController(), list[str]()
    watch = FleetWatch(controller, 0, said.append)
    for _ in range(2):
        controller.answers["events"] = RuntimeError("The controller died.")
        watch.look(wants_restart=False)
    controller.answers["events"] = [(1, "a worker serves")]
    watch.look(wants_restart=False)
    assert said == ["The controller died.", "a worker serves"]
