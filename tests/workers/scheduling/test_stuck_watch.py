"""Requests are stuck after idle steps alone, for long enough."""

from __future__ import annotations

import pytest

from lorafleet.workers.scheduling.stuck_watch import StuckWatch


@pytest.mark.parametrize(
    ("steps", "is_stuck"),  # (time, whether the step found nothing to do for those that wait)
    [
        ([(0.0, True)], False),
        ([(0.0, True), (9.9, True)], False),
        ([(0.0, True), (10.0, True)], True),
        ([(0.0, True), (5.0, False), (10.0, True)], False),
        ([(0.0, True), (5.0, False), (6.0, True), (16.0, True)], True),
        ([(0.0, False), (20.0, False)], False),
    ],
)
def test_stuck_is_what_waits_through_idle_steps_alone(steps: list[tuple[float, bool]], is_stuck: bool) -> None:
    watch = StuckWatch(10.0)
    outcomes = [watch.is_stuck(now, is_idle=is_idle) for now, is_idle in steps]
    assert outcomes == [False] * (len(steps) - 1) + [is_stuck]
