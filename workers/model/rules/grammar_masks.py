"""Grammars: a request's output follows its grammar, and ends when that allows nothing more.

Masks are computed on threads of llguidance's own, during the step's forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import llguidance
import torch

from lorafleet.workers.errors import InvalidRequestError, LoRAFleetError, cut
from lorafleet.workers.grammars.threads import grammar_threads, mask_executor
from lorafleet.workers.model.rules.changes import Changes
from lorafleet.workers.model.rules.rule import History, LogitRule, Row
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions


@dataclass(slots=True, eq=False)
class _Progress:
    """How far a request's output has gone through its grammar."""

    matcher: llguidance.LLMatcher
    num_words: int  # of a mask
    num_taken: int = 0  # output tokens


@dataclass(frozen=True, slots=True)
class _Fill:
    """The masks of one step's rows that have the same width."""

    rows: list[int]
    entries: list[_Progress]
    words_RW: torch.Tensor


class GrammarMasks(LogitRule):
    """Forbids the tokens that a request's grammar does not allow. `begin` each request that has one."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._entries: WeakKeyDictionary[Request, _Progress] = WeakKeyDictionary()
        self._pool: ThreadPoolExecutor | None = None  # started with the first request
        self._executor: llguidance.LLExecutor | None = None
        self._filling: Future[list[_Fill]] | None = None

    def begin(self, request: Request, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        """Take a request's compiled grammar, of its own. vocab_size: of the vocabulary it is compiled for."""
        if self._pool is None:
            self._pool, self._executor = grammar_threads(1, "grammar masks"), mask_executor(self._num_threads)
        self._entries[request] = _Progress(matcher, -(-vocab_size // 32))

    def take(self, sampled: Sequence[tuple[Request, int]]) -> Mapping[Request, bool | LoRAFleetError]:
        """Take note of new tokens of requests with a grammar. Return for each whether it is complete, or its error."""
        if not sampled:
            return {}
        assert self._executor is not None
        entries = [self._entries[request] for request, _ in sampled]
        tokens = [(entry.matcher, token_id) for entry, (_, token_id) in zip(entries, sampled, strict=True)]
        ends: dict[Request, bool | LoRAFleetError] = {}
        accepted = self._executor.consume_token_par(tokens)
        for entry, (request, _), is_accepted in zip(entries, sampled, accepted, strict=True):
            entry.num_taken += 1
            ends[request] = entry.matcher.is_stopped() if is_accepted else _failure(entry)
        return ends

    def history(self, sampling: SamplingOptions) -> History | None:
        return History.KNOWN if sampling.grammar else None

    def prepare(self, rows: Sequence[Row]) -> None:
        assert self._pool is not None
        entries = [self._entries[request] for _, request in rows]
        outputs: list[tuple[_Progress, list[int]]] = []  # tokens that `take` has not seen: of a resumed request
        for entry, (_, request) in zip(entries, rows, strict=True):
            if entry.num_taken < request.num_output_tokens:
                first = request.num_prompt_tokens + entry.num_taken
                outputs.append((entry, request.token_ids[first : request.num_known_tokens]))
        self._filling = self._pool.submit(self._fill, [number for number, _ in rows], entries, outputs)

    def write(self, rows: Sequence[Row], changes: Changes) -> None:
        assert self._filling is not None
        for fill in self._filling.result():
            changes.allow(fill.rows, fill.words_RW)
            for row, entry in zip(fill.rows, fill.entries, strict=True):
                if entry.matcher.is_error():
                    changes.fail(row, _failure(entry))
        self._filling = None

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(
        self, rows: list[int], entries: list[_Progress], outputs: list[tuple[_Progress, list[int]]]
    ) -> list[_Fill]:
        """Compute the masks. On a thread."""
        assert self._executor is not None
        for entry, token_ids in outputs:
            entry.matcher.consume_tokens(token_ids)
            entry.num_taken += len(token_ids)
        fills = []
        for num_words in dict.fromkeys(entry.num_words for entry in entries):
            some = [(row, entry) for row, entry in zip(rows, entries, strict=True) if entry.num_words == num_words]
            words_RW = torch.empty(len(some), num_words, dtype=torch.int32)
            matchers = [(entry.matcher, place) for place, (_, entry) in enumerate(some)]
            self._executor.unsafe_compute_mask_ptr(matchers, words_RW.data_ptr(), 4 * num_words, len(some))
            fills.append(_Fill([row for row, _ in some], [entry for _, entry in some], words_RW))
        return fills


def _failure(entry: _Progress) -> LoRAFleetError:
    reason = cut(" ".join(entry.matcher.get_error().split()))
    return InvalidRequestError(
        f"After {entry.num_taken} tokens the request's grammar cannot be followed: {reason}. Simplify it.",
        param="structured_outputs",
    )
