"""allowed_token_ids: the only tokens that a request may get."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch

from lorafleet.workers.model.rules.changes import Changes
from lorafleet.workers.model.rules.rule import History, LogitRule, Row
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions


class AllowedTokenIds(LogitRule):
    """Forbids all other tokens."""

    def __init__(self) -> None:
        self._words: WeakKeyDictionary[Request, torch.Tensor] = WeakKeyDictionary()  # masks, [1, W]

    def history(self, sampling: SamplingOptions) -> History | None:
        return History.LENGTH if sampling.allowed_token_ids else None

    def write(self, rows: Sequence[Row], changes: Changes) -> None:
        for row, request in rows:
            words_1W = self._words.get(request)
            if words_1W is None:
                words_1W = self._words[request] = _mask(request.sampling.allowed_token_ids)
            changes.allow([row], words_1W)


def _mask(token_ids: frozenset[int]) -> torch.Tensor:
    bits = np.zeros(32 * (max(token_ids) // 32 + 1), np.uint8)
    bits[list(token_ids)] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little").view("<i4"))[None]
