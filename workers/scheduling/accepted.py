"""Accepted requests: those that an engine has taken and that have not ended.

Owns: whether one more is taken (its id, its tenant's places, admission control), and its end. Leaves to others: what a
request may ask for (request_checks.py), its adapters (engine/registered.py). Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorafleet.workers.errors import InvalidRequestError, QueueFullError
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.shares import Shares
from lorafleet.workers.scheduling.turns import AdmissionControl, WaitBound


class AcceptedRequests:
    """Requests by id, in the order of acceptance."""

    def __init__(self, bound: WaitBound, *, max_waiting: int | None) -> None:
        """max_waiting: requests beyond those in the batch; None: any number."""
        self.admission = AdmissionControl(bound)
        # By tenant; None: any number.
        self.places = None if max_waiting is None else Shares(max_waiting + bound.num_seats)
        self._requests: dict[str, GenerateRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[str]:
        return iter(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def adapters(self) -> list[tuple[str, ...]]:
        """Return the digests of each request that has adapters."""
        return [request.digests for request in self._requests.values() if request.digests]

    def add(self, request: GenerateRequest) -> None:
        """Take a request. Raises `InvalidRequestError` if its id is in use, `QueueFullError` if there is no room."""
        if request.request_id in self._requests:
            raise InvalidRequestError(f"Request id {request.request_id!r} is in use.", param="request_id")
        full = None if self.places is None else self.places.take(request.tenant)
        if full is not None:
            raise QueueFullError(
                f"{full.num_taken} requests run or wait, the limit is {full.limit} (--max-waiting and "
                f"--max-num-seqs); {full.num_held} are yours, your share is {full.share}. Try again later."
            )
        is_hot = self.admission.hot.issuperset(request.digests)
        try:
            self.admission.enter(request.tenant, request.model_key, len(request.digests), is_hot=is_hot)
        except QueueFullError:
            self._give_back_place(request)
            raise
        self._requests[request.request_id] = request

    def end(self, request_id: str) -> GenerateRequest:
        """Give up the places of a request that has ended, and return it."""
        request = self._requests.pop(request_id)
        self.admission.leave(request.tenant, request.model_key, len(request.digests))
        self._give_back_place(request)
        return request

    def clear(self) -> None:
        """Forget all: nothing is accepted any more."""
        self._requests.clear()

    def _give_back_place(self, request: GenerateRequest) -> None:
        if self.places is not None:
            self.places.give_back(request.tenant)
