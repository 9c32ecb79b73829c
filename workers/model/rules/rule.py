"""The seam for what changes logits: `LogitRule`.

A rule is one kind of change, made for all rows of a batch that ask for it. It says which of a request's tokens it must
know (`History`), so that steps overlap as far as they can: a step's forward pass never waits, and its sampling waits
for the previous step's tokens only if a row's rule must know them.

In each step the sampler calls, with the rows that a rule concerns:

1. `prepare` as soon as the tokens that the rule must know are known: before the forward pass, or during it if they come
   from the step before. What takes long begins here, on other threads.
2. `write` after the forward pass was launched: the step's changes.
3. `sampled` with the step's tokens, which may be on the device only.

A rule's state belongs to a request, and is made again from the request's tokens whenever it is missing. So a request
resumes after preemption, or on another worker with its output so far, as if nothing had happened. The tokens known are
`request.token_ids[: request.num_known_tokens]`, the output among them those from `request.num_prompt_tokens` on; they
only ever grow, so a rule that remembers how many it has taken reads the rest of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch

from lorafleet.workers.model.rules.changes import Changes
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions


class History(IntEnum):
    """What a rule must know of a request's tokens before the next one is sampled."""

    LENGTH = 0  # their number
    SAMPLED = 1  # all of them, but `sampled` is enough for the last one
    KNOWN = 2  # all of them: none in `request.token_ids` is pending


class Row(NamedTuple):
    """A row of a step's logits."""

    number: int
    request: Request


class LogitRule(Protocol):
    """One kind of change to logits. Used by the stepping thread alone.

    State by request goes into a `weakref.WeakKeyDictionary`: requests end without notice.
    """

    @abstractmethod
    def history(self, sampling: SamplingOptions) -> History | None:
        """Return what must be known of a request with these options; None if the rule does not concern it."""

    def prepare(self, rows: Sequence[Row]) -> None:
        """Begin to compute the rows' changes. Returns at once."""
        return

    @abstractmethod
    def write(self, rows: Sequence[Row], changes: Changes) -> None:
        """Write the rows' changes. Nothing here may wait for the device."""

    def sampled(self, rows: Sequence[Row], token_ids_S: torch.Tensor) -> None:
        """Take note of the tokens that were sampled: int64, on the device, by number of row."""
        return
