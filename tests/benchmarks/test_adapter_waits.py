"""What the benchmark of the bound on waiting says of what it has measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks are run from the repository, never installed

from benchmarks.adapter_waits import BOUND_S, CASES, LATE_S, SLOW_CASES, Case, Row, Side, Waits

CASE = Case(1.0, 100, 4)  # the base model's four tenants of eight have a right to a half


def side(tokens_per_s: float, base_tokens_per_s: float, longest_wait_s: float = 1.0) -> Side:
    return Side(tokens_per_s, base_tokens_per_s, longest_wait_s, 0, 0, 0)


@pytest.mark.parametrize(
    ("plain", "bounded", "is_met"),
    [
        (side(1000, 400), side(1000, 400), True),
        (side(1000, 400), side(800, 320), True),
        (side(1000, 400), side(799, 400), False),
        (side(1000, 400), side(1000, 319), False),
        (side(1000, 900), side(1000, 400), True),  # its fair share is 500
        (side(1000, 900), side(1000, 399), False),
        (side(1000, 400, 90.0), side(1000, 400, BOUND_S + LATE_S), True),
        (side(1000, 400), side(1000, 400, BOUND_S + LATE_S + 0.1), False),
    ],
)
def test_throughput_the_base_models_share_and_waits_are_judged(plain: Side, bounded: Side, is_met: bool) -> None:
    row = Row(CASE, plain, bounded)
    assert row.is_met == is_met
    assert row.line().endswith("NOT MET") != is_met


def test_waits_are_between_tokens_and_those_that_were_refused_do_not_count() -> None:
    waits = Waits()
    for request_id, at in (("a", 0.0), ("b", 1.0), ("c", 2.0)):
        waits.accept(request_id, at)
    waits.token("a", 3.0)
    waits.token("a", 4.0)
    waits.end("a", 4.0)
    assert waits.longest_s == 3.0
    waits.end("b", 9.0, is_refused=True)
    assert waits.longest_s == 3.0
    assert waits.stop(4.5) == 3.0 and waits.stop(12.0) == 10.0, "c waits still"


def test_every_case_has_its_clients_and_the_slow_ones_cover_the_range() -> None:
    clients = Case(0.1, 3, 2).clients()
    assert [client for client in clients if client[1] is not None] == [
        (f"t{tenant}", number) for number in range(3) for tenant in range(2)
    ]
    assert {tenant for tenant, adapter in clients if adapter is None} == {"b0", "b1", "b2", "b3"}
    for cases in (CASES, SLOW_CASES):
        assert {0.01, 10.0} <= {case.read_s for case in cases}
        assert {10, 500} <= {case.num_adapters for case in cases}
        assert {1, 8} <= {case.num_tenants for case in cases}
