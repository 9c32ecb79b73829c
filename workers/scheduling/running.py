"""The running requests: their seats, and the effect of each start and end on pages, slots and flows.

Owns: the seats. Leaves to others: the requests that get one (scheduler.py) and that are preempted (preemption.py).

A request that has started is never preempted before it has produced a token. So each preemption is paid for with a new
token, there are fewer preemptions than tokens, and requests cannot preempt each other for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lorafleet.workers.scheduling.flows import Flows
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.request_pages import RequestPages
from lorafleet.workers.scheduling.residency import Residency


class Running:
    """Holds `max_num_seqs` seats. Iterates over the requests in the order of their starts."""

    def __init__(self, flows: Flows, pages: RequestPages, residency: Residency, *, max_num_seqs: int) -> None:
        self._flows = flows
        self._pages = pages
        self._residency = residency
        self._max_num_seqs = max_num_seqs
        self._requests: list[Request] = []
        self._begun: Counter[str] = Counter()  # adapters → requests that have begun and have not ended
        # Adapters → requests that wait since they were preempted for a turn.
        self.preempted_for_turns: Counter[str | None] = Counter()
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0  # tokens known when requests started
        self.num_prefix_hit_tokens = 0  # the query tokens that needed no computing

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def num_free_seats(self) -> int:
        return self._max_num_seqs - len(self._requests)

    def have_begun(self, digest: str) -> bool:
        """Return whether requests for an adapter run, or have run and wait to resume. For any thread."""
        return digest in self._begun

    def start(self, request: Request, now: float, *, is_urgent: bool = False) -> bool:
        """Start a waiting request whose adapters are ready. A seat must be free. False: too few pages are free."""
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
        """Make a running request that has produced a token wait again; the content of its pages may still be found.

        for_turn: the request is preempted for another flow's turn.
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
        """Remove a request that runs or waits. is_spoiled: its pages must not be found by others."""
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
        """Stop counting a request that waits no more as preempted for a turn."""
        if request.was_preempted_for_turn:
            self.preempted_for_turns[request.adapter] -= 1
            if not self.preempted_for_turns[request.adapter]:
                del self.preempted_for_turns[request.adapter]

    def _leave(self, request: Request, *, is_spoiled: bool = False) -> None:
        self._requests.remove(request)
        self._pages.free(request, is_spoiled=is_spoiled)
        self._residency.release(request)

    def check_integrity(self, waiting: list[Request]) -> None:
        """Check that seats, pages and uses are those of the running requests. For tests."""
        assert self.num_free_seats >= 0
        assert all(request.is_charged for request in self._requests)
        begun = [request for request in waiting if request.num_preemptions] + self._requests
        assert self._begun == Counter(digest for request in begun for digest in request.digests)
        assert self.preempted_for_turns == Counter(
            request.adapter for request in waiting if request.was_preempted_for_turn
        )
        self._pages.check_integrity(self._requests, waiting)
        self._residency.check_integrity(self._requests)
