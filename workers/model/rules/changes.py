"""One step's changes of logits: rules write them, the sampler gathers them for the kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lorafleet.kernels.logit_changes import Bias, LogitChanges, Mask, Penalties, Seen
from lorafleet.workers.errors import LoRAFleetError
from lorafleet.workers.model.transfer import send

TokenIds = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


class Changes:
    """What rules write for one step. A row is an index of the step's logits."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size  # width of the logits
        self.errors: dict[int, LoRAFleetError] = {}  # by row
        self._device = device
        self._bias: list[tuple[int, TokenIds, Values]] = []
        self._masks: list[tuple[Sequence[int], torch.Tensor]] = []
        self._penalties: tuple[Sequence[int], torch.Tensor, Seen] | None = None

    def add(self, row: int, token_ids: TokenIds, values: Values) -> None:
        """Add `values` to the logits of `token_ids`; -inf forbids a token. Ids outside the vocabulary have no effect.

        The arrays must not change any more.
        """
        self._bias.append((row, token_ids, values))

    def allow(self, rows: Sequence[int], words_RW: torch.Tensor) -> None:
        """Forbid all tokens but those whose bit is set: token t is bit t % 32 of word t // 32, int32, on the host.

        Tokens after the last word are forbidden. Of several masks of one row all apply. The words may change after the
        step's launch. A row without any token left ends with an error.
        """
        self._masks.append((rows, words_RW))

    def penalise(self, rows: Sequence[int], factors_R3: torch.Tensor, seen: Seen) -> None:
        """Apply the penalties of kernels/logit_changes.py; once in a step. factors_R3: on the host."""
        assert self._penalties is None
        self._penalties = rows, factors_R3, seen

    def fail(self, row: int, error: LoRAFleetError) -> None:
        """End the row's request with an error instead of a token. The other rows go on."""
        self.errors[row] = error

    def gather(self) -> LogitChanges | None:
        """Return all of them on the device; None if nothing changes."""
        masks, penalties = self._combined(), self._penalties
        rows = sorted({*(row for row, _, _ in self._bias), *(masks or ((),))[0], *(penalties or ((),))[0]})
        if not rows:
            return None
        place_of = {row: place for place, row in enumerate(rows)}

        def column(values: Sequence[int]) -> torch.Tensor:
            return send(torch.tensor(values, dtype=torch.int64), self._device)

        def places(rows: Sequence[int]) -> torch.Tensor:
            return column([place_of[row] for row in rows])

        return LogitChanges(
            row_P=column(rows),
            bias=self._gather_bias(place_of),
            penalties=penalties and Penalties(places(penalties[0]), send(penalties[1], self._device), penalties[2]),
            mask=masks and Mask(places(masks[0]), send(masks[1], self._device)),
        )

    def _gather_bias(self, place_of: dict[int, int]) -> Bias | None:
        if not self._bias:
            return None
        entries = sorted(self._bias, key=lambda entry: entry[0])
        token_ids = np.concatenate([token_ids for _, token_ids, _ in entries])
        values = np.concatenate([values for _, _, values in entries])
        place = np.repeat([place_of[row] for row, _, _ in entries], [len(token_ids) for _, token_ids, _ in entries])
        if token_ids.max(initial=0) >= self.vocab_size:
            is_known = token_ids < self.vocab_size
            place, token_ids, values = place[is_known], token_ids[is_known], values[is_known]
        at = send(torch.from_numpy(np.stack([place, token_ids])), self._device)
        return Bias(at[0], at[1], send(torch.from_numpy(values), self._device))

    def _combined(self) -> tuple[Sequence[int], torch.Tensor] | None:
        """Return the rows with masks, and one mask for each."""
        if len(self._masks) < 2:
            return self._masks[0] if self._masks else None
        masks: dict[int, torch.Tensor] = {}
        for rows, words_RW in self._masks:
            for row, words_W in zip(rows, words_RW, strict=True):
                other = masks.get(row)
                width = min(len(words_W), len(words_W if other is None else other))
                masks[row] = words_W if other is None else words_W[:width] & other[:width]
        width = max(map(len, masks.values()))
        words_RW = torch.zeros(len(masks), width, dtype=torch.int32)
        for words_W, own in zip(words_RW, masks.values(), strict=True):
            words_W[: len(own)] = own
        return list(masks), words_RW
