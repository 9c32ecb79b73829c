"""The adapters' own parts of embedding and head, each at its exact size, made when its slot is filled.

Whatever is as large as the vocabulary is here and not in the slots' tables. How many bytes of it there may be at a
time, engine/adapter_slots.py decides; a slot's part is freed when it is cleared or filled anew.

Under tensor parallelism a rank has the rows of its range of the base's vocabulary. The rows of added ids, behind them,
are on every rank: there they are few.

T rows of the step, H hidden, V the base's vocabulary, X ids of this rank (its range of V, then the added ones),
N single ids, R lora rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F

from lorafleet.kernels.linear import LinearWeight, dense, gather_rows, linear, prepare
from lorafleet.kernels.lora import LoraSegments, LoraSlots, lora_add_
from lorafleet.workers.adapters.format import HostAdapter, LinearChange, TableChange
from lorafleet.workers.adapters.modules import EMBEDDING, HEAD, NO_LAYER

_ROWS_AT_ONCE = 4096  # of a table, where all of it is gone through


@dataclass(frozen=True, slots=True)
class IdRange:
    """The ids of one rank: from `start` to `stop` of the base's, then all that the adapter adds."""

    start: int
    stop: int
    vocab_size: int  # the base model's
    num_added: int
    embeds_added: bool  # one rank does, so that a sum over all ranks has them once

    @property
    def size(self) -> int:
        return self.stop - self.start + self.num_added

    def cut(self, table: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's part of a dimension with all ids."""
        if self.size == table.shape[dim]:
            return table
        own = table.narrow(dim, self.start, self.stop - self.start)
        return torch.cat([own, table.narrow(dim, self.vocab_size, self.num_added)], dim)

    def place(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Where they are in a part; -1: on another rank."""
        added = token_ids - self.vocab_size + self.stop - self.start
        own = torch.where((token_ids >= self.start) & (token_ids < self.stop), token_ids - self.start, -1)
        return torch.where(token_ids >= self.vocab_size, added, own)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingPart:
    """One adapter's embedding on one rank."""

    ids: IdRange
    weight: LinearWeight | None  # [X, H]
    row_ids_N: torch.Tensor | None  # ascending; on every rank
    rows_NH: torch.Tensor | None
    a_XR: torch.Tensor | None  # of LoRA
    b_RH: torch.Tensor | None
    scaling: float
    scale_H: torch.Tensor | None  # float32; DoRA's

    def apply_(self, x_TH: torch.Tensor, token_ids_T: torch.Tensor) -> None:
        """x: in the rows of the base model's embedding, in place its own. Rows of ids of other ranks become 0."""
        place_T = self.ids.place(token_ids_T)
        is_here_T = place_T >= 0
        if not self.ids.embeds_added:
            is_here_T &= token_ids_T < self.ids.vocab_size
        place_T = place_T.masked_fill(~is_here_T, 0)
        own_TH = x_TH if self.weight is None else gather_rows(self.weight, place_T)
        if self.row_ids_N is not None and self.rows_NH is not None:
            nearest_T = torch.searchsorted(self.row_ids_N, token_ids_T).clamp_(max=len(self.row_ids_N) - 1)
            is_single_T = self.row_ids_N[nearest_T] == token_ids_T
            own_TH = torch.where(is_single_T[:, None], self.rows_NH[nearest_T], own_TH)
        if self.a_XR is not None and self.b_RH is not None:
            term_TH = self.scaling * F.embedding(place_T, self.a_XR).float() @ self.b_RH.float()
            own_TH = own_TH.float() + term_TH
            if self.scale_H is not None:
                own_TH *= self.scale_H
        x_TH.copy_(own_TH.masked_fill(~is_here_T[:, None], 0.0))


@dataclass(frozen=True, slots=True)
class HeadPart:
    """One adapter's head on one rank."""

    ids: IdRange
    weight: LinearWeight | None  # [X, H]
    row_places_N: torch.Tensor | None  # among X; those of this rank
    rows_NH: torch.Tensor | None
    lora: LoraSlots | None  # one slot, one slice

    def apply_(self, x_TH: torch.Tensor, logits_TX: torch.Tensor) -> None:
        """logits: those of the base model's head, in place its own. Those of added ids may hold anything before."""
        if self.weight is not None:
            logits_TX.copy_(linear(x_TH, self.weight))
        if self.row_places_N is not None and self.rows_NH is not None:
            logits_TX[:, self.row_places_N] = F.linear(x_TH, self.rows_NH)
        if self.lora is not None:
            device = x_TH.device
            start, end, slot = torch.tensor([[0], [x_TH.shape[0]], [0]], dtype=torch.int32, device=device)
            lora_add_(logits_TX, x_TH, self.lora, LoraSegments(start, end, slot, torch.ones(1, device=device)))


@dataclass(frozen=True, slots=True)
class VocabularyPart:
    """What one slot's adapter has of both."""

    embedding: EmbeddingPart | None
    head: HeadPart | None

    def num_bytes(self) -> int:
        """Of the memory that it holds."""
        storages = {}
        for part in (self.embedding, self.head):
            for name in () if part is None else part.__slots__:
                for tensor in _tensors(getattr(part, name)):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())


def make_part(
    adapter: HostAdapter, ids: IdRange, embedding: LinearWeight, head: LinearWeight, lora_dtype: torch.dtype
) -> VocabularyPart:
    """Copy an adapter's tables to where the base model's are, of which `embedding` and `head` are this rank's rows.

    Where not all of an embedding's rows are here, `HostAdapter.norms` has those of DoRA on it already.
    """
    own, own_head = (adapter.tables.get(module) for module in (EMBEDDING, HEAD))
    head_part = None if own_head is None else _make_head(adapter, own_head, ids, head, lora_dtype)
    if own is None:
        return VocabularyPart(None, head_part)
    is_shared = own_head is not None and own.weight_VH is own_head.weight_VH
    shared = head_part.weight if head_part is not None and is_shared else None
    return VocabularyPart(
        _make_embedding(adapter, own, ids, base=embedding, shared=shared, lora_dtype=lora_dtype), head_part
    )


def _make_embedding(
    adapter: HostAdapter,
    change: TableChange,
    ids: IdRange,
    *,
    base: LinearWeight,
    shared: LinearWeight | None,
    lora_dtype: torch.dtype,
) -> EmbeddingPart:
    """`shared`: the head's weight, where it is the embedding's too."""
    like = base.data
    weight = shared
    if weight is None and change.weight_VH is not None:
        weight = prepare(_own(ids.cut(change.weight_VH), like.device, like.dtype), packed=False)
    row_ids_N, rows_NH = _rows(change, like)
    a_XR = b_RH = scale_H = None
    scaling = 0.0
    if change.lora is not None:
        scaling = change.lora.scaling
        a_XR = _own(ids.cut(change.lora.a_RI.T), like.device, lora_dtype)
        b_RH = _own(change.lora.b_RO, like.device, lora_dtype)
        if change.lora.magnitude_O is not None:
            norm_H = adapter.norms.get((NO_LAYER, EMBEDDING))
            if norm_H is None:
                assert ids.stop - ids.start == ids.vocab_size, "the squares of all ranks are summed before"
                squares_H = _column_squares(change.lora, ids, weight or base, row_ids_N, rows_NH)
                norm_H = adapter.norms[NO_LAYER, EMBEDDING] = squares_H.sqrt_()
            scale_H = (change.lora.magnitude_O / norm_H).to(like.device)
    return EmbeddingPart(
        ids=ids,
        weight=weight,
        row_ids_N=row_ids_N,
        rows_NH=rows_NH,
        a_XR=a_XR,
        b_RH=b_RH,
        scaling=scaling,
        scale_H=scale_H,
    )


def _make_head(
    adapter: HostAdapter, change: TableChange, ids: IdRange, base: LinearWeight, lora_dtype: torch.dtype
) -> HeadPart:
    like = base.data
    weight = None
    if change.weight_VH is not None:
        weight = prepare(_own(ids.cut(change.weight_VH), like.device, like.dtype))
    row_ids_N, rows_NH = _rows(change, like)
    places_N = None
    if row_ids_N is not None and rows_NH is not None:
        places_N = ids.place(row_ids_N)
        is_here_N = places_N >= 0
        places_N, rows_NH = places_N[is_here_N], rows_NH[is_here_N]
    lora = None
    if change.lora is not None:
        lora = _head_lora(
            adapter, change.lora, ids, weight=weight or base, places_N=places_N, rows_NH=rows_NH, lora_dtype=lora_dtype
        )
    return HeadPart(ids, weight, places_N, rows_NH, lora)


def _head_lora(
    adapter: HostAdapter,
    change: LinearChange,
    ids: IdRange,
    *,
    weight: LinearWeight,
    places_N: torch.Tensor | None,
    rows_NH: torch.Tensor | None,
    lora_dtype: torch.dtype,
) -> LoraSlots:
    device = weight.data.device
    a_RH, b_RX = change.a_RI, ids.cut(change.b_RO, 1)
    scale_X = shift_X = None
    if change.magnitude_O is not None or change.b_bias_O is not None:
        scale_X, shift_X = torch.ones(ids.size), torch.zeros(ids.size)
        if change.magnitude_O is not None:
            norm_X = adapter.norms.get((NO_LAYER, HEAD))
            if norm_X is None:
                b_XR = b_RX.T.float()
                parts = [
                    rows_XH.addmm_(b_XR[first : first + len(rows_XH)], a_RH.float(), alpha=change.scaling).norm(dim=1)
                    for first, rows_XH in _dense_rows(weight, ids, places_N, rows_NH)
                ]
                norm_X = adapter.norms[NO_LAYER, HEAD] = torch.cat(parts)
            scale_X = ids.cut(change.magnitude_O) / norm_X
        if change.b_bias_O is not None:
            shift_X = change.scaling * scale_X * ids.cut(change.b_bias_O)

    def table(values: torch.Tensor | None) -> torch.Tensor:
        return torch.empty(1, 0, device=device) if values is None else values.to(device)[None]

    def number(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[value]], dtype=dtype, device=device)

    return LoraSlots(
        a_LNRI=_own(a_RH, device, lora_dtype)[None, None],
        b_LRO=_own(b_RX, device, lora_dtype)[None],
        rank_LN=number(a_RH.shape[0], torch.int32),
        scaling_LN=number(change.scaling, torch.float32),
        is_affine_LN=number(scale_X is not None, torch.int32),
        scale_LO=table(scale_X),
        shift_LO=table(shift_X),
        slice_end_N=torch.tensor([ids.size], dtype=torch.int32, device=device),
    )


def embedding_squares(change: TableChange, ids: IdRange, base: LinearWeight) -> torch.Tensor:
    """An embedding with DoRA: over this rank's ids, the sums of squares of the columns of W + s·(B·A)ᵀ, [H].

    PEFT takes an embedding's norms over the vocabulary.
    """
    assert change.lora is not None
    weight = base
    if change.weight_VH is not None:
        weight = prepare(_own(ids.cut(change.weight_VH), base.data.device, base.data.dtype), packed=False)
    return _column_squares(change.lora, ids, weight, *_rows(change, base.data))


def _column_squares(
    change: LinearChange,
    ids: IdRange,
    weight: LinearWeight,
    row_ids_N: torch.Tensor | None,
    rows_NH: torch.Tensor | None,
) -> torch.Tensor:
    a_XR, b_RH = ids.cut(change.a_RI.T), change.b_RO.float()
    places_N = None if row_ids_N is None else ids.place(row_ids_N)
    num_counted = ids.size if ids.embeds_added else ids.stop - ids.start
    squares_H = torch.zeros(b_RH.shape[1])
    for first, rows_XH in _dense_rows(weight, ids, places_N, rows_NH):
        rows_XH.addmm_(a_XR[first : first + len(rows_XH)].float(), b_RH, alpha=change.scaling)
        squares_H += rows_XH[: max(0, num_counted - first)].square_().sum(dim=0)
    return squares_H


def _dense_rows(
    weight: LinearWeight, ids: IdRange, places_N: torch.Tensor | None, rows_NH: torch.Tensor | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first place, rows in float32 on the host) of all ids of a rank, some at a time; single rows are put in."""
    for first in range(0, ids.size, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, ids.size)
        rows_XH = torch.zeros(last - first, weight.num_in)
        known = min(last, weight.num_out)
        if known > first:
            rows_XH[: known - first] = dense(weight, slice(first, known)).cpu()
        if places_N is not None and rows_NH is not None:
            is_in_N = (places_N >= first) & (places_N < last)
            rows_XH[(places_N[is_in_N] - first).cpu()] = rows_NH[is_in_N].float().cpu()
        yield first, rows_XH


def _rows(change: TableChange, like: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(ids ascending, their rows) of single ids; `like`: in its dtype and on its device."""
    if not change.rows:
        return None, None
    number = {token_id: n for n, token_id in enumerate(chain.from_iterable(ids for ids, _ in change.rows))}
    token_ids = sorted(number)
    rows_NH = torch.cat([rows for _, rows in change.rows])[[number[token_id] for token_id in token_ids]]
    return torch.tensor(token_ids, device=like.device), rows_NH.to(like.device, like.dtype)


def _own(weights: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy: what the host has may be evicted there."""
    return torch.empty(weights.shape, dtype=dtype, device=device).copy_(weights)


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, LinearWeight):
        return [value.data]
    if isinstance(value, LoraSlots):
        return [value.a_LNRI, value.b_LRO, value.scale_LO, value.shift_LO]
    return [value] if isinstance(value, torch.Tensor) else []
