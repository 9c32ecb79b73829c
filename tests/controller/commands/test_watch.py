"""A command's output and requests while its fleet serves."""

from __future__ import annotations

from typing import Any

from lorafleet.controller.commands.watch import FleetWatch
from lorafleet.controller.fleet.actor import Outcome


class FakeController:
    """Gives the answers set; None stands for an answer that takes longer."""

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


class Clock:
    """A clock that advances a second with each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_events_are_printed_once_and_asked_for_from_the_last_one_on() -> None:
    controller, said = FakeController(), list[str]()
    watch = FleetWatch(controller, 2, said.append, Clock())
    watch.look(wants_restart=False)
    controller.answers["events"] = [(3, "a worker is lost"), (4, "it is back")]
    watch.look(wants_restart=False)
    watch.look(wants_restart=False)
    assert said == ["a worker is lost", "it is back"]
    assert controller.asked == [("events", (2,)), ("events", (2,)), ("events", (4,))]


def test_a_restart_begins_once_and_its_outcome_is_printed() -> None:
    controller, said = FakeController(), list[str]()
    watch = FleetWatch(controller, 0, said.append, Clock())
    assert watch.look(wants_restart=True)
    assert not watch.look(wants_restart=True), "one is under way"
    controller.answers["restart_workers"] = Outcome(True, "all 2 workers were restarted")
    watch.look(wants_restart=False)
    watch.look(wants_restart=False)
    assert said == ["restarting the workers, one after the other ...", "all 2 workers were restarted"]
    assert [method for method, _ in controller.asked].count("restart_workers") == 3


def test_a_silent_controller_ends_nothing_and_is_reported_once() -> None:
    controller, said = FakeController(), list[str]()
    watch = FleetWatch(controller, 0, said.append, Clock())
    controller.answers["events"] = RuntimeError("The controller died.")
    for _ in range(5):
        watch.look(wants_restart=False)
    assert said == []
    for _ in range(5):
        watch.look(wants_restart=False)
    controller.answers["events"] = [(1, "a worker serves")]
    watch.look(wants_restart=False)
    assert said == [
        "the controller has not answered for 6 s; gateways and workers keep serving; Ray restarts it",
        "the controller answers again",
        "a worker serves",
    ]


def test_time_in_which_the_command_was_stopped_is_no_silence() -> None:
    controller, said, clock = FakeController(), list[str](), Clock()
    watch = FleetWatch(controller, 0, said.append, clock)
    watch.look(wants_restart=False)
    clock.now += 3600
    watch.look(wants_restart=False)
    assert said == []
