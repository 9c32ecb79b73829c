"""What the next step is to run: which requests with how many tokens, in which order of rows, and what to load beside.

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
        """Whether this step reaches the end of what is known, so that a next token is to be sampled."""
        return self.request.num_computed_tokens + self.num_tokens == self.request.num_tokens

    @property
    def num_base_tokens(self) -> int:
        """Of its tokens the first ones, which come before the place where the adapter begins."""
        return min(self.num_tokens, max(0, self.request.adapter_start - self.request.num_computed_tokens))


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """An adapter to be copied into a slot; then `finish_load` or `fail_load` of the slots is due."""

    digest: str
    slot: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next step computes, grouped by slots (base model first), so that an adapter's rows are one segment.

    Where an activated adapter begins amid a request's rows, those before it part the others from the group. Such
    requests come first in their group: there is one segment for each of them, and none more for all others.
    """

    scheduled: tuple[Scheduled, ...]
    loads: tuple[SlotLoad, ...]
    prefetches: tuple[str, ...] = ()  # adapters to bring into the host cache, since slots are to come free for them

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.scheduled)


def in_row_order(entries: Iterable[Scheduled]) -> tuple[Scheduled, ...]:
    """The order that `StepPlan` promises; between equals the given one."""
    return tuple(sorted(entries, key=_row_order))


def _row_order(entry: Scheduled) -> tuple[tuple[int, ...], tuple[float, ...], bool]:
    num_base_tokens = entry.num_base_tokens
    if num_base_tokens == entry.num_tokens:
        return (), (), False
    return entry.slots, entry.request.weights, num_base_tokens == 0
