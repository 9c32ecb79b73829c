"""A request is taken once, within its tenant's share, and gives back all that it had when it ends."""

from __future__ import annotations

import pytest

from lorafleet.workers.errors import InvalidRequestError, QueueFullError
from lorafleet.workers.scheduling.accepted import AcceptedRequests
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.scheduling.turns import WaitBound


def request(request_id: str, adapter: str | None = None, tenant: str = "t") -> GenerateRequest:
    return GenerateRequest(request_id, (1, 2), SamplingOptions(max_tokens=2), adapter, tenant=tenant)


def accepted(max_waiting: int | None = 4, max_wait_s: float = 0.0) -> AcceptedRequests:
    """Two slots, two seats."""
    return AcceptedRequests(WaitBound(max_wait_s, 2, 2), max_waiting=max_waiting)


def test_they_are_known_until_they_end() -> None:
    requests = accepted()
    requests.add(request("a", "x"))
    requests.add(request("b"))
    assert list(requests) == ["a", "b"] and "a" in requests and len(requests) == 2
    assert requests.adapters() == [("x",)]
    assert requests.end("a").adapter == "x"
    assert list(requests) == ["b"]


def test_an_id_in_use_is_refused_and_nothing_is_taken_for_it() -> None:
    requests = accepted()
    requests.add(request("a"))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        requests.add(request("a"))
    requests.end("a")
    assert requests.places is not None and requests.places.num_taken == 0


def test_a_tenant_over_its_share_is_refused_with_the_flags_and_the_numbers() -> None:
    requests = accepted(max_waiting=4)
    with pytest.raises(QueueFullError, match=r"the limit is 6 .*--max-waiting and --max-num-seqs.*are yours"):
        for number in range(10):
            requests.add(request(str(number)))
    num_taken = len(requests)
    requests.end("0")
    requests.add(request("again"))
    assert len(requests) == num_taken


def test_any_number_is_taken_without_a_limit() -> None:
    requests = accepted(max_waiting=None)
    for number in range(100):
        requests.add(request(str(number)))
    assert len(requests) == 100


def test_one_that_could_not_be_served_in_time_gives_its_place_back() -> None:
    requests = accepted(max_waiting=1000, max_wait_s=5.0)
    with pytest.raises(QueueFullError):
        for number in range(1000):
            requests.add(request(str(number), f"adapter{number}", tenant=f"t{number}"))
    assert requests.places is not None and requests.places.num_taken == len(requests)
    for request_id in list(requests):
        requests.end(request_id)
    assert requests.places.num_taken == 0
    assert not requests.admission.num_waiting_flows
