"""Running means, and how long a measurement counts."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from lorafleet.workers.scheduling.pace import Pace, PaceMeter


class Clock:
    """Stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> PaceMeter:
    return PaceMeter(clock)


def test_nothing_is_known_before_it_is_measured(meter: PaceMeter) -> None:
    assert meter.pace() == Pace()
    meter.book_step(0.04, 0)
    meter.book_load(0.5, from_disk=True)
    assert meter.pace() == Pace(step_s=0.04, disk_load_s=0.5)


def test_means_follow_the_samples_slowly(meter: PaceMeter) -> None:
    for seconds in (0.1, 0.2):
        meter.book_seat(seconds)
        meter.book_load(seconds, from_disk=False)
    assert meter.pace().seat_s == pytest.approx(0.11)
    assert meter.pace().host_load_s == pytest.approx(0.11)


def test_a_prompts_tokens_cost_what_a_step_takes_longer_with_them(meter: PaceMeter) -> None:
    meter.book_step(0.04, 0)
    meter.book_step(0.14, 100)
    meter.book_step(9.0, 3)  # too few to tell
    assert asdict(meter.pace()) == pytest.approx(asdict(Pace(step_s=0.04, prompt_token_s=0.001)))


def test_a_worker_that_was_slow_once_is_not_called_slow_for_ever(meter: PaceMeter, clock: Clock) -> None:
    meter.book_step(3.0, 0)
    meter.book_seat(60.0)
    clock.now += 11.0
    assert meter.pace() == Pace(seat_s=60.0), "requests that have ended count for longer than steps"
    meter.book_step(0.04, 0)
    assert meter.pace().step_s == 0.04, "and nothing of the old mean is in the new one"
    clock.now += 60.0
    assert meter.pace() == Pace()
