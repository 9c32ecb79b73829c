"""The requests that run: who has a seat, and what each start and end does to pages, slots and flows.

Owns: the seats. Leaves to others: who gets one (scheduler.py) and who gives it up (preemption.py).

A request that has begun to run is never preempted before it has got a token. So every preemption is paid for with a
token that was not there before, there are fewer preemptions than tokens, and requests cannot preempt each other for
ever, whoever gives way to whom.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lorafleet.workers.scheduling.flows import Flows
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.request_pages import RequestPages
from lorafleet.workers.scheduling.residency import Residency


class Running:
    """`max_num_seqs` seats. Iterates by start."""

    def __init__(self, flows: Flows, pages: RequestPages, residency: Residency, *, max_num_seqs: int) -> None:
        self._flows = flows
        self._pages = pages
        self._residency = residency
        self._max_num_seqs = max_num_seqs
        self._requests: list[Request] = []
        self._begun: Counter[str] = Counter()  # adapters → requests that have begun to run and have not ended
        self.preempted_for_turns: Counter[str | None] = (
            Counter()
        )  # adapters → requests that wait since they gave way for a turn
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0  # known when requests started
        self.num_prefix_hit_tokens = 0  # of these, those that needed no computing

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def num_free_seats(self) -> int:
        return self._max_num_seqs - len(self._requests)

    def have_begun(self, digest: str) -> bool:
        """Whether requests for an adapter run, or have run and wait to go on. For any thread."""
        return digest in self._begun

    def start(self, request: Request, now: float, *, is_urgent: bool = False) -> bool:
        """Let a waiting request run whose adapters are ready. There must be a seat. False: pages are too few."""
        assert self.num_free_seats > 0
        if not self._pages.place(request):
            return False
        self._flows.start(request)
        self._flows.charge_prompt(request, request.num_computed_tokens)
        self.num_prefix_query_tokens += request.num_tokens
        self.num_prefix_hit_tokens += request.num_computed_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
        if not request.num_preemptions:
            self._begun.update(request.digests)
        self._forget_preemption(request)
        self._residency.acquire(request, now)
        request.is_urgent = is_urgent
        request.started_at = now
        request.num_tokens_at_start = request.num_tokens
        self._requests.append(request)
        return True

    def preempt(self, request: Request, *, for_turn: bool = False) -> None:
        """Let a running request that has got a token wait again; what its pages hold may still be found.

        gives_way: for others' turn.
        """
        assert request.has_progressed
        self._leave(request)
        request.was_preempted_for_turn = for_turn
        if for_turn:
            self.preempted_for_turns[request.adapter] += 1
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._flows.put_back(request)

    def remove(self, request: Request, *, is_spoiled: bool) -> None:
        """A request that runs or waits has ended. is_spoiled: its pages hold what nobody should find."""
        runs = request in self._requests
        if runs:
            self._leave(request, is_spoiled=is_spoiled)
        else:
            self._forget_preemption(request)
        self._flows.drop(request, runs=runs)
        if runs or request.num_preemptions:
            for digest in request.digests:
                self._begun[digest] -= 1
                if not self._begun[digest]:
                    del self._begun[digest]

    def _forget_preemption(self, request: Request) -> None:
        """A request that may have given way waits no more."""
        if request.was_preempted_for_turn:
            self.preempted_for_turns[request.adapter] -= 1
            if not self.preempted_for_turns[request.adapter]:
                del self.preempted_for_turns[request.adapter]

    def _leave(self, request: Request, *, is_spoiled: bool = False) -> None:
        self._requests.remove(request)
        self._pages.free(request, is_spoiled=is_spoiled)
        self._residency.release(request)

    def check_integrity(self, waiting: list[Request]) -> None:
        """Seats, pages and uses are those of the requests that run. For tests."""
        assert self.num_free_seats >= 0
        assert all(request.is_charged for request in self._requests)
        begun = [request for request in waiting if request.num_preemptions] + self._requests
        assert self._begun == Counter(digest for request in begun for digest in request.digests)
        assert self.preempted_for_turns == Counter(
            request.adapter for request in waiting if request.was_preempted_for_turn
        )
        self._pages.check_integrity(self._requests, waiting)
        self._residency.check_integrity(self._requests)
