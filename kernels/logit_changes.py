"""Changes of logits before sampling: bias, penalties and masks, in this order, which is vLLM's.

With x a row's logits in float32:
1. Bias: x[t] += value, for each (t, value); -inf forbids a token.
2. Penalties: for tokens of prompt or output, x[t] becomes x[t] / repetition where it is positive, else
   x[t] · repetition (Keskar et al. 2019); for tokens of the output, x[t] -= frequency · count + presence. No result is
   above the largest float32: a small repetition penalty overflows, which does not mean a broken model.
3. Masks: x[t] = -inf for each token whose bit is not set.

P rows that change, V vocabulary, N entries, R rows with penalties or with a mask, W words of 32 tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorafleet.kernels.seen_tokens import addresses

# The tokens of rows' prompts and outputs, see seen_tokens.py: a list each, on the host, or codes of all tokens, [R, V].
Seen = Sequence[torch.Tensor] | torch.Tensor


@dataclass(frozen=True, slots=True)
class Bias:
    """Values added to single logits. A (row, token) may occur more than once."""

    place_N: torch.Tensor  # int64, ascending: of the row among those that change
    token_N: torch.Tensor  # int64
    value_N: torch.Tensor  # float32


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties of some rows."""

    place_R: torch.Tensor  # int64
    factors_R3: torch.Tensor  # float32: repetition, frequency, presence
    seen: Seen


@dataclass(frozen=True, slots=True)
class Mask:
    """Which tokens some rows allow: token t is bit t % 32 of word t // 32. Tokens after the last word are forbidden."""

    place_R: torch.Tensor  # int64
    words_RW: torch.Tensor  # int32


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitChanges:
    """All changes of a batch."""

    row_P: torch.Tensor  # int64, ascending: the rows that change
    bias: Bias | None = None
    penalties: Penalties | None = None
    mask: Mask | None = None


class NativeChanges(ctypes.Structure):
    """`LogitChanges` as cpu/logit_changes.h has it. The tensors are kept as long as this object."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("place", "bias_start", "bias_token", "bias_value")),
        *((name, ctypes.c_void_p) for name in ("seen", "factors", "mask")),
        ("num_words", ctypes.c_int64),
    )

    def __init__(self, changes: LogitChanges, num_rows: int) -> None:
        super().__init__()
        self._kept: list[torch.Tensor] = []
        num_places = len(changes.row_P)
        place_S = torch.full((num_rows,), -1)
        place_S[changes.row_P] = torch.arange(num_places)
        self.place = self._pointer(place_S)
        bias, penalties, mask = changes.bias, changes.penalties, changes.mask
        if bias is not None:
            self.bias_start = self._pointer(torch.searchsorted(bias.place_N, torch.arange(num_places + 1)))
            self.bias_token, self.bias_value = self._pointer(bias.token_N), self._pointer(bias.value_N)
        if penalties is not None:
            assert not isinstance(penalties.seen, torch.Tensor), "a table is for a GPU"
            self.seen = self._pointer(_spread(penalties.place_R, addresses(penalties.seen), num_places))
            self.factors = self._pointer(_spread(penalties.place_R, penalties.factors_R3, num_places))
        if mask is not None:
            words_RW = mask.words_RW.contiguous()
            self._kept.append(words_RW)
            self.num_words = words_RW.shape[1]
            at_R = torch.arange(len(words_RW)) * (4 * self.num_words) + words_RW.data_ptr()
            self.mask = self._pointer(_spread(mask.place_R, at_R, num_places))

    def _pointer(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _spread(place_R: torch.Tensor, values: torch.Tensor, num_places: int) -> torch.Tensor:
    """Return the values by place; 0 elsewhere."""
    spread = values.new_zeros(num_places, *values.shape[1:])
    spread[place_R] = values
    return spread


def change_logits_(logits_PV: torch.Tensor, changes: LogitChanges) -> None:
    """Change the rows' logits, float32, in place."""
    bias, penalties = changes.bias, changes.penalties
    if bias is not None:
        logits_PV.index_put_((bias.place_N, bias.token_N), bias.value_N, accumulate=True)
    if penalties is not None:
        _penalise(logits_PV, penalties)
    if changes.mask is not None:
        _mask(logits_PV, changes.mask)


def _penalise(logits_PV: torch.Tensor, penalties: Penalties) -> None:
    place_R, factors_R3, seen = penalties.place_R, penalties.factors_R3, penalties.seen
    if isinstance(seen, torch.Tensor):
        logits_PV[place_R] = _penalised(logits_PV[place_R], seen, *factors_R3.split(1, dim=1))
        return
    for place, factors_3, tokens_C2 in zip(place_R.tolist(), factors_R3, seen, strict=True):
        token_ids, codes = tokens_C2[1 : 1 + int(tokens_C2[0, 0])].unbind(1)
        within = token_ids < logits_PV.shape[1]
        token_ids, codes = token_ids[within].long(), codes[within]
        logits_PV[place, token_ids] = _penalised(logits_PV[place, token_ids], codes, *factors_3)


def _penalised(
    x: torch.Tensor, codes: torch.Tensor, repetition: torch.Tensor, frequency: torch.Tensor, presence: torch.Tensor
) -> torch.Tensor:
    x = torch.where(codes > 0, torch.where(x > 0, x / repetition, x * repetition), x)
    count = codes >> 1
    x -= frequency * count
    x -= presence * (count > 0)
    return x.clamp_(max=torch.finfo(torch.float32).max)


def _mask(logits_PV: torch.Tensor, mask: Mask) -> None:
    bit_32 = torch.arange(32, dtype=torch.int32, device=mask.words_RW.device)
    is_allowed_RX = ((mask.words_RW[:, :, None] >> bit_32) & 1).bool().flatten(1)
    num_rows, vocab_size = len(mask.place_R), logits_PV.shape[1]
    width = min(vocab_size, is_allowed_RX.shape[1])
    is_forbidden_RV = torch.ones(num_rows, vocab_size, dtype=torch.bool, device=logits_PV.device)
    is_forbidden_RV[:, :width] = ~is_allowed_RX[:, :width]
    logits_PV[mask.place_R] = logits_PV[mask.place_R].masked_fill_(is_forbidden_RV, -torch.inf)
