"""logit_bias: what a request adds to the logits of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from lorafleet.workers.model.rules.changes import Changes, TokenIds, Values
from lorafleet.workers.model.rules.rule import History, LogitRule, Row
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions


class LogitBias(LogitRule):
    """Adds a request's values to logits."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[Request, tuple[TokenIds, Values]] = WeakKeyDictionary()

    def history(self, sampling: SamplingOptions) -> History | None:
        return History.LENGTH if sampling.logit_bias else None

    def write(self, rows: Sequence[Row], changes: Changes) -> None:
        for row, request in rows:
            entries = self._entries.get(request)
            if entries is None:
                token_ids, values = zip(*request.sampling.logit_bias, strict=True)
                entries = self._entries[request] = np.array(token_ids, np.int64), np.array(values, np.float32)
            changes.add(row, *entries)
