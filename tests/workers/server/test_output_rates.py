"""Rates of counts that are looked at now and then."""

from __future__ import annotations

from lorafleet.workers.server.output_rates import WINDOW_S, OutputRates


def looks(*looks: tuple[float, dict[str, int]]) -> dict[str, float]:
    """Return the rates of the last look."""
    times = iter([when for when, _ in looks])
    rates = OutputRates(clock=lambda: next(times))
    said: dict[str, float] = {}
    for _, counts in looks:
        said = rates.look(counts)
    return said


def test_the_first_look_knows_none() -> None:
    assert looks((0.0, {"a": 5})) == {}


def test_a_rate_is_the_mean_since_the_first_look_and_a_new_name_began_at_0() -> None:
    assert looks((0.0, {"a": 5}), (2.0, {"a": 9, "b": 4})) == {"a": 2.0, "b": 2.0}


def test_what_is_older_than_the_window_does_not_count() -> None:
    steady = [(float(second), {"a": 100 + second}) for second in range(20)]
    burst = [(20.0, {"a": 219}), (21.0, {"a": 219})]
    assert looks(*steady)["a"] == 1.0
    assert looks(*steady, *burst)["a"] == (219 - 116) / WINDOW_S


def test_a_long_pause_between_looks_is_averaged_over() -> None:
    assert looks((0.0, {"a": 0}), (100.0, {"a": 500})) == {"a": 5.0}


def test_a_count_that_began_again_gives_no_negative_rate() -> None:
    assert looks((0.0, {"a": 50}), (1.0, {"a": 3})) == {"a": 0.0}


def test_two_looks_at_once_divide_by_nothing() -> None:
    assert looks((1.0, {"a": 0}), (1.0, {"a": 3})) == {}
