"""A step as a value: which requests run with how many tokens, in which order of rows, and what is loaded beside.

Values only. Leaves to others: choosing them (scheduler.py), carrying them out (engine/loop.py, model/runner.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorafleet.workers.scheduling.request import Request


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part of a step."""

    request: Request
    num_tokens: int  # from request.num_computed_tokens on
    slots: tuple[int, ...]  # of request.digests; none: the base model

    @property
    def samples(self) -> bool:
        """Return whether this step computes the last known token, so that the next one is sampled."""
        return self.request.num_computed_tokens + self.num_tokens == self.request.num_tokens

    @property
    def num_scored(self) -> int:
        """Return how many of its first rows give the log-probability of the prompt token that follows."""
        request = self.request
        if not request.needs_prompt_logprobs:
            return 0
        return min(self.num_tokens, request.num_prompt_tokens - 1 - request.num_computed_tokens)

    @property
    def num_base_tokens(self) -> int:
        """Return how many of its first tokens come before the place where the adapter is activated."""
        return min(self.num_tokens, max(0, self.request.adapter_start - self.request.num_computed_tokens))


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """An adapter to be copied into a slot."""

    digest: str
    slot: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, from `Scheduler.schedule` to whoever carries it out: engine/loop.py.

    Carry it out in this order. The plan already counts as decided, so every part must be carried out, or reported as
    failed, before the next `schedule`:

    1. `loads`: begin each copy. It needs no waiting: no request of this plan uses these slots. Each ends, in any later
       step, with one `finish_load` or `fail_load` of the slots.
    2. `prefetches`: begin to read these adapters into the host cache. Nothing is to be reported.
    3. `scheduled`: launch all entries as one batch, whose rows are in this order, then call `advance` for each. A plan
       without entries is not launched.
    4. When the batch's results are there, call `settle` for each entry that `samples`, unless the request has ended
       since. The next plan may be asked for before that, but only one.
    """

    # Grouped by slots, the base model's entries first, so that an adapter's rows are one segment for the kernels. An
    # activated adapter may begin amid a request's rows: such requests come first in their group, each a segment.
    scheduled: tuple[Scheduled, ...]
    loads: tuple[SlotLoad, ...]  # the slots are empty or have been emptied: nothing reads them now
    prefetches: tuple[str, ...] = ()  # digests of adapters for which slots are about to come free

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.scheduled)


def in_row_order(entries: Iterable[Scheduled]) -> tuple[Scheduled, ...]:
    """Return the entries in the order that `StepPlan` promises, equal ones as given."""
    return tuple(sorted(entries, key=_row_order))


def _row_order(entry: Scheduled) -> tuple[tuple[int, ...], tuple[float, ...], bool]:
    num_base_tokens = entry.num_base_tokens
    if num_base_tokens == entry.num_tokens:
        return (), (), False
    return entry.slots, entry.request.weights, num_base_tokens == 0
