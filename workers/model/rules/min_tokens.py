"""min_tokens: until a request has that many output tokens, nothing that would end it can be sampled."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from lorafleet.workers.model.rules.changes import Changes, TokenIds, Values
from lorafleet.workers.model.rules.rule import History, LogitRule, Row
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

_Ends = tuple[TokenIds, Values]


class MinTokens(LogitRule):
    """Forbids EOS and stop tokens before min_tokens."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._ends: WeakKeyDictionary[Request, _Ends] = WeakKeyDictionary()

    def history(self, sampling: SamplingOptions) -> History | None:
        return History.LENGTH if sampling.min_tokens else None

    def write(self, rows: Sequence[Row], changes: Changes) -> None:
        for row, request in rows:
            if request.num_output_tokens < request.sampling.min_tokens:
                ends = self._ends.get(request)
                if ends is None:
                    ends = self._ends[request] = self._make(request.sampling)
                changes.add(row, *ends)

    def _make(self, sampling: SamplingOptions) -> _Ends:
        stops = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else self._eos_token_ids)
        return np.array(sorted(stops), np.int64), np.full(len(stops), -np.inf, np.float32)
