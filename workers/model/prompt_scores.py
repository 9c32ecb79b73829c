"""Log-probabilities of prompt tokens, from the logits of the rows before them.

The logits come some rows at a time, and each piece is reduced at once, so that a long prompt never has all of its
logits in memory.

P rows of a piece, N scored rows of the step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorafleet.workers.model.sampling import logprobs_of, widened
from lorafleet.workers.model.transfer import Fetched, send
from lorafleet.workers.scheduling.batch import Scheduled
from lorafleet.workers.scheduling.logprobs import PromptLogprobs
from lorafleet.workers.scheduling.request import Request


class PendingScores:
    """The launched log-probabilities of one step."""

    def __init__(self, requests: Sequence[tuple[Request, int]], columns: Sequence[torch.Tensor]) -> None:
        """requests: each with the number of its rows, in their order. columns: those of `logprobs_of`."""
        self._requests = requests
        self._fetched = Fetched(columns)

    def results(self) -> dict[Request, PromptLogprobs | None]:
        """Return each request's; None: its logits hold NaN or +inf. Waits for the device."""
        logprobs_N, ranks_N, ids_NK, top_NK = self._fetched.tensors()
        results: dict[Request, PromptLogprobs | None] = {}
        first = 0
        for request, count in self._requests:
            rows = slice(first, first + count)
            first += count
            num_top = request.sampling.prompt_logprobs or 0
            is_finite = not logprobs_N[rows].isnan().any()
            results[request] = (
                PromptLogprobs.of(
                    num_top,
                    logprobs_N[rows].tolist(),
                    ranks_N[rows].tolist(),
                    ids_NK[rows, :num_top].flatten().tolist(),
                    top_NK[rows, :num_top].flatten().tolist(),
                )
                if is_finite
                else None
            )
        return results


class PromptScores:
    """The log-probabilities of one step: `add` the logits of its scored rows, in their order, then take `pending`."""

    def __init__(self, scheduled: Sequence[Scheduled], device: torch.device) -> None:
        self._requests = [(entry.request, entry.num_scored) for entry in scheduled if entry.num_scored]
        self._next_ids: list[int] = []  # the prompt token after each row
        for request, count in self._requests:
            first = request.num_computed_tokens + 1
            self._next_ids += request.token_ids[first : first + count]
        self._num_top = max((request.sampling.prompt_logprobs or 0 for request, _ in self._requests), default=0)
        self._device = device
        self._num_added = 0
        self._pieces: list[tuple[torch.Tensor, ...]] = []

    def add(self, logits_PV: torch.Tensor) -> None:
        """Add the logits of the next rows."""
        next_ids = self._next_ids[self._num_added : self._num_added + len(logits_PV)]
        self._num_added += len(logits_PV)
        raw_PV = widened(logits_PV.float().log_softmax(dim=1), max(next_ids) + 1)
        next_ids_P = send(torch.tensor(next_ids), self._device)
        self._pieces.append(logprobs_of(raw_PV, next_ids_P, self._num_top))

    def pending(self) -> PendingScores | None:
        """Return the result, None without scored rows."""
        if not self._requests:
            return None
        assert self._num_added == len(self._next_ids)
        return PendingScores(self._requests, [torch.cat(column) for column in zip(*self._pieces, strict=True)])
