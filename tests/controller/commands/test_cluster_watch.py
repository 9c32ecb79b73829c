"""A command's reaction to a Ray cluster that is silent, lost, or another one."""

from __future__ import annotations

from concurrent.futures import Future

from lorafleet.controller.commands.cluster_watch import AWAY_S, FLEET_ENDED, SILENT_S, ClusterWatch


class FakeCluster:
    """Answers on command."""

    def __init__(self) -> None:
        self.dead: list[str] = []
        self.asked: list[Future[str]] = []

    def dead_processes(self) -> list[str]:
        return self.dead

    def ask_if_it_lives(self) -> Future[str]:
        self.asked.append(Future())
        return self.asked[-1]


class Watched:
    """A watch whose looks are half a second apart."""

    def __init__(self) -> None:
        self.cluster, self.said, self.now = FakeCluster(), list[str](), 0.0
        self.watch = ClusterWatch(self.cluster, self.said.append, lambda: self.now)

    def look(self, seconds: float = 0.5) -> str:
        """Look for so long. Return the first reason for an end."""
        until = self.now + seconds
        while self.now < until:
            self.now += 0.5
            if lost := self.watch.look():
                return lost
        return ""


def test_one_that_answers_is_asked_again_and_nothing_is_printed() -> None:
    watched = Watched()
    for number in range(10):
        assert watched.look(3.0) == ""
        assert len(watched.cluster.asked) == number + 1, "never twice at a time"
        watched.cluster.asked[-1].set_result("")
    assert watched.said == []


def test_an_answer_that_the_fleet_is_lost_is_the_end() -> None:
    watched = Watched()
    watched.look()
    watched.cluster.asked[0].set_result(FLEET_ENDED)
    assert watched.look() == FLEET_ENDED


def test_a_process_of_rays_that_has_ended_is_the_end_at_once() -> None:
    watched = Watched()
    watched.cluster.dead = ["raylet ended with exit code -9"]
    assert watched.look() == "Ray has failed: its raylet ended with exit code -9."


def test_silence_and_its_end_are_each_reported_once() -> None:
    watched = Watched()
    assert watched.look(SILENT_S + 5.0) == ""
    watched.cluster.asked[-1].set_exception(ConnectionError("nothing answers there"))
    assert watched.look(2.0) == ""
    assert watched.said == [
        "the Ray cluster has not answered for 10 s; gateways and workers keep serving",
    ]
    watched.cluster.asked[-1].set_result("")
    assert watched.look() == ""
    assert watched.said[1:] == ["the Ray cluster answers again"]


def test_lasting_silence_is_the_end() -> None:
    watched = Watched()
    assert watched.look(AWAY_S + 5.0) == "The Ray cluster has not answered for 50 s."


def test_time_in_which_the_command_was_stopped_is_no_silence() -> None:
    watched = Watched()
    watched.look()
    watched.now += 3600
    assert watched.look() == ""
    assert watched.said == []
