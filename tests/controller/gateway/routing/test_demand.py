"""The fading count of requests."""

from __future__ import annotations

import math

import pytest

from lorafleet.controller.gateway.routing.demand import FADE_S, Demand


def test_requests_add_up_and_fade() -> None:
    now = 0.0
    demand = Demand(lambda: now)
    assert demand.book("a") == 0.0
    assert demand.book("a") == 1.0
    assert demand.book("b") == 0.0
    now = FADE_S
    assert demand.book("a") == pytest.approx(2 / math.e)


def test_a_key_without_requests_is_forgotten() -> None:
    now = 0.0
    demand = Demand(lambda: now)
    for number in range(1000):
        demand.book(number)
    now = 100.0
    demand.book("a")
    assert len(demand._counts) == 1
