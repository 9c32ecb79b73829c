"""The base model's part of the seats: the shares of the tenants that use it."""

from __future__ import annotations

import pytest

from lorafleet.workers.scheduling.base_seats import BaseSeats


@pytest.mark.parametrize(
    ("num_seats", "flows", "part"),
    [
        (64, [], 0),
        (64, [("t", "a")], 0),
        (64, [("t", None)], 56),  # an eighth is left to adapters
        (64, [("t", None), ("u", "a")], 32),
        (64, [("t", None), ("u", "a"), ("u", "b")], 32),  # tenants count, not their adapters
        (64, [("t", None), ("t", "a")], 32),  # half of the only tenant's share
        (64, [("t", None), ("t", "a"), ("u", "a"), ("v", "a"), ("w", "a")], 8),
        (64, [("t", None), ("u", None), ("u", "a"), ("v", "a")], 32),
        (1, [("t", None)], 0),
        (4, [("t", None)], 3),
    ],
)
def test_a_tenant_has_an_even_share_and_the_base_model_half_of_it_beside_adapters(
    num_seats: int, flows: list[tuple[str, str | None]], part: int
) -> None:
    seats = BaseSeats(num_seats)
    for tenant, adapter in flows:
        seats.count(tenant, is_base=adapter is None, change=1)
    seats.check_integrity(flows)
    assert seats.part == part
    for tenant, adapter in flows:
        seats.count(tenant, is_base=adapter is None, change=-1)
    seats.check_integrity([])
    assert seats.part == 0


def test_no_more_seats_are_kept_than_requests_wait_for() -> None:
    seats = BaseSeats(64)
    seats.count("t", is_base=True, change=1)
    seats.count("u", is_base=False, change=1)
    assert (seats.num_kept(0), seats.num_kept(5), seats.num_kept(100)) == (0, 5, 32)
    seats.num_running = 30
    assert seats.num_kept(5) == 2
    seats.num_running = 40
    assert seats.num_kept(5) == 0
