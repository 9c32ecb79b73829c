"""bad_words: where the output ends with all tokens of a word but the last, that one is forbidden."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from lorafleet.workers.model.rules.changes import Changes, TokenIds, Values
from lorafleet.workers.model.rules.rule import History, LogitRule, Row
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.scheduling.token_rules import BadWords


class ForbiddenWords(LogitRule):
    """Forbids the last tokens of words. Only the output counts, as in vLLM."""

    def __init__(self) -> None:
        self._tables: WeakKeyDictionary[Request, _Table] = WeakKeyDictionary()

    def history(self, sampling: SamplingOptions) -> History | None:
        if not sampling.bad_words:
            return None
        return History.LENGTH if max(map(len, sampling.bad_words)) == 1 else History.KNOWN

    def write(self, rows: Sequence[Row], changes: Changes) -> None:
        for row, request in rows:
            table = self._tables.get(request)
            if table is None:
                table = self._tables[request] = _Table(request.sampling.bad_words)
            if len(table.single):
                changes.add(row, table.single, table.minus_inf)
            forbidden = table.next_tokens(request)
            if forbidden:
                changes.add(row, np.array(forbidden, np.int64), np.full(len(forbidden), -np.inf, np.float32))


class _Table:
    """One request's words, by their last token but one."""

    def __init__(self, words: BadWords) -> None:
        self.single: TokenIds = np.array([word[0] for word in words if len(word) == 1], np.int64)
        self.minus_inf: Values = np.full(len(self.single), -np.inf, np.float32)
        self._longer: defaultdict[int, list[tuple[list[int], int]]] = defaultdict(list)
        for *before, last in words:
            if before:
                self._longer[before[-1]].append((before, last))

    def next_tokens(self, request: Request) -> list[int]:
        """Return the last tokens of words of which the output has all others, at its end."""
        if not request.num_output_tokens:
            return []
        token_ids, num_output = request.token_ids, request.num_output_tokens
        return [
            last
            for before, last in self._longer.get(token_ids[-1], ())
            if len(before) <= num_output and token_ids[-len(before) :] == before
        ]
