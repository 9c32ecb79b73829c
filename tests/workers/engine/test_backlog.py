"""The order in which accepted requests come to the scheduler."""

from __future__ import annotations

from lorafleet.workers.engine.backlog import Backlog
from lorafleet.workers.engine.request import GenerateRequest, SamplingOptions


def filled(*names: str) -> Backlog:
    """Each name's first letter is its tenant."""
    backlog = Backlog()
    for name in names:
        backlog.add(GenerateRequest(name, (1,), SamplingOptions(max_tokens=1), tenant=name[0]))
    return backlog


def taken(backlog: Backlog) -> list[str]:
    order = []
    while (request := backlog.take()) is not None:
        order.append(request.request_id)
    return order


def test_one_tenants_come_in_the_order_in_which_they_came() -> None:
    assert taken(filled("a1", "a2", "a3")) == ["a1", "a2", "a3"]


def test_tenants_take_turns() -> None:
    assert taken(filled("a1", "a2", "a3", "b1", "b2", "c1")) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_who_comes_later_is_next_but_one_at_most() -> None:
    backlog = filled("a1", "a2", "a3")
    backlog.take()
    backlog.add(GenerateRequest("b1", (1,), SamplingOptions(max_tokens=1), tenant="b"))
    assert taken(backlog) == ["a2", "b1", "a3"]


def test_what_is_discarded_does_not_come() -> None:
    backlog = filled("a1", "b1", "a2")
    assert backlog.discard("b1") and backlog.discard("a1") and not backlog.discard("b1")
    assert (len(backlog), list(backlog)) == (1, ["a2"])
    assert taken(backlog) == ["a2"]
    assert len(backlog) == 0
