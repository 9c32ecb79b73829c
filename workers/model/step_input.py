"""A step plan as tensors for the decoder and the sampler. Only here do requests become rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorafleet.kernels.dispatch import uses_triton
from lorafleet.kernels.lora import LoraSegments
from lorafleet.kernels.lora_tiles import LoraTiles, TileLists, block_rows_for, divide
from lorafleet.workers.model.transfer import send
from lorafleet.workers.scheduling.batch import Scheduled

# T tokens of the step, S sequences in it, P pages of the longest sequence


@dataclass(frozen=True, slots=True)
class OwnTables:
    """A segment whose adapter has its own embedding or head."""

    slot: int
    rows: slice
    samples: slice  # among the rows that sample
    scored: slice  # among the scored rows


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """The input of one step. Sequence s has the rows query_start[s] to query_start[s + 1]."""

    token_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    slot_mapping_T: torch.Tensor  # int64: page * page_size + offset, the place of the token's key and value
    page_table_SP: torch.Tensor  # int32, each sequence's pages in order; undefined after the last
    query_start_S1: torch.Tensor  # int32
    context_len_S: torch.Tensor  # int32: keys to attend to, this step's included
    sample_rows: torch.Tensor  # int64: rows that sample
    scored_rows: torch.Tensor  # int64: rows whose logits give log-probabilities of prompt tokens
    segments: LoraSegments | LoraTiles | None  # None: no request uses an adapter; no LoRA op runs
    which_norm_T: torch.Tensor | None = None  # int32, indices of model/norm.py; None: all rows use the base model's
    own_tables: tuple[OwnTables, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The used part of the buffers."""

    num_tokens: int = 0
    num_seqs: int = 0
    num_pages: int = 0  # of the longest sequence
    num_samples: int = 0
    num_scored: int = 0
    num_segments: int = 0


class _Area:
    """Numbers on the host and, for another device, a copy there. Both keep their addresses."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        tensor = torch.zeros(shape, dtype=dtype)
        self.host: npt.NDArray[Any] = tensor.numpy()
        self._tensor = tensor
        self._device = device
        self._twin = None if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)

    def first(self, count: int) -> torch.Tensor:
        """Return the first numbers on the device, with the host's current values."""
        if self._twin is None:
            return self._tensor[:count]
        return send(self._tensor[:count], self._device, into=self._twin[:count])


class StepBuffers:
    """The memory of every step's input, allocated once for the largest step.

    A step's tensors are views at the same addresses each time, and the page table's row stride is fixed. When a method
    returns, data for another device is being sent and the buffers may be filled again.
    """

    def __init__(
        self,
        *,
        page_size: int,
        max_num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        max_composed: int,
        device: torch.device,
    ) -> None:
        """max_composed: adapters per sequence."""
        max_num_segments = max_num_seqs * max_composed
        self._page_size = page_size
        self._device = device
        self._has_tiles = uses_triton(device)

        def area(*shape: int, dtype: torch.dtype = torch.int32) -> _Area:
            return _Area(shape, dtype, device)

        self._token_ids = area(max_num_tokens, dtype=torch.int64)
        self._positions = area(max_num_tokens, dtype=torch.int64)
        self._slot_mapping = area(max_num_tokens, dtype=torch.int64)
        self._page_table = area(max_num_seqs, -(-max_model_len // page_size))
        self._query_start = area(max_num_seqs + 1)
        self._context_len = area(max_num_seqs)
        self._sample_rows = area(max_num_seqs, dtype=torch.int64)
        self._scored_rows = area(max_num_tokens, dtype=torch.int64)
        self._which_norm = area(max_num_tokens)
        self._tiles = area(6 * max_num_seqs + 1)  # for decode steps
        # First row, end row, slot, first sampling row, end sampling row, first scored row, end scored row.
        self._segments = np.zeros((7, max_num_segments), np.int32)
        self._weights = np.ones(max_num_segments, np.float32)

    def fill(self, scheduled: Sequence[Scheduled]) -> StepShape:
        """Lay out a non-empty plan that is grouped by adapter slots, as `StepPlan` guarantees.

        A segment is a run of rows with one slot's adapter. Rows before a request's `adapter_start` are in no segment;
        rows of a composition are in one segment per adapter, in the order of the digests.
        """
        page_size = self._page_size
        token_ids, positions, slot_mapping = self._token_ids.host, self._positions.host, self._slot_mapping.host
        num_samples = num_scored = num_segments = num_pages = row = 0
        applied: tuple[tuple[int, ...], tuple[float, ...]] = (), ()  # slots and weights of the last row so far
        for s, entry in enumerate(scheduled):
            request = entry.request
            first = request.num_computed_tokens
            last = first + entry.num_tokens
            end = row + entry.num_tokens
            pages = self._page_table.host[s]
            pages[: len(request.pages)] = request.pages
            num_pages = max(num_pages, len(request.pages))
            if entry.num_tokens == 1:
                token_ids[row] = request.token_ids[first]
                positions[row] = first
                slot_mapping[row] = request.pages[first // page_size] * page_size + first % page_size
            else:
                token_ids[row:end] = request.token_ids[first:last]
                own = np.arange(first, last)
                positions[row:end] = own
                slot_mapping[row:end] = pages[own // page_size].astype(np.int64) * page_size + own % page_size
            self._context_len.host[s] = last
            self._query_start.host[s + 1] = end
            first_sample = num_samples
            if entry.samples:
                self._sample_rows.host[num_samples] = end - 1
                num_samples += 1
            start = row + entry.num_base_tokens
            first_scored = num_scored
            if scored := entry.num_scored:
                self._scored_rows.host[num_scored : num_scored + scored] = np.arange(row, row + scored)
                first_scored += min(scored, start - row)
                num_scored += scored
            before, applied = applied, (entry.slots, request.weights) if start < end else ((), ())
            if applied == before and start == row:
                self._segments[1, num_segments - len(entry.slots) : num_segments] = end
                self._segments[4, num_segments - len(entry.slots) : num_segments] = num_samples
                self._segments[6, num_segments - len(entry.slots) : num_segments] = num_scored
            else:
                for slot, weight in zip(*applied, strict=True):
                    counted = first_sample, num_samples, first_scored, num_scored
                    self._segments[:, num_segments] = start, end, slot, *counted
                    self._weights[num_segments] = weight
                    num_segments += 1
            row = end
        return StepShape(
            num_tokens=row,
            num_seqs=len(scheduled),
            num_pages=num_pages,
            num_samples=num_samples,
            num_scored=num_scored,
            num_segments=num_segments,
        )

    def pack(self, shape: StepShape) -> npt.NDArray[np.int32]:
        """Pack a step in the buffers for another rank."""
        pages = self._page_table.host[: shape.num_seqs, : shape.num_pages]
        parts = *self._parts(shape), pages, self._segments[:, : shape.num_segments]
        weights = self._weights[: shape.num_segments].view(np.int32)
        return np.concatenate(
            [np.array(astuple(shape)), *(part.reshape(-1) for part in parts), weights], dtype=np.int32
        )

    def unpack(self, packed: npt.NDArray[np.int32]) -> StepShape:
        """Fill the buffers with the result of another rank's `pack`."""
        names = [field.name for field in fields(StepShape)]
        begin = len(names)
        shape = StepShape(**dict(zip(names, packed[:begin].tolist(), strict=True)))
        pages = self._page_table.host[: shape.num_seqs, : shape.num_pages]
        weights = self._weights[: shape.num_segments].view(np.int32)
        for part in (*self._parts(shape), pages, self._segments[:, : shape.num_segments], weights):
            part[...] = packed[begin : begin + part.size].reshape(part.shape)
            begin += part.size
        assert begin == len(packed)
        return shape

    def _parts(self, shape: StepShape) -> tuple[npt.NDArray[Any], ...]:
        """Return the one-dimensional parts. All their numbers fit in 31 bits."""
        return (
            self._token_ids.host[: shape.num_tokens],
            self._positions.host[: shape.num_tokens],
            self._slot_mapping.host[: shape.num_tokens],
            self._query_start.host[: shape.num_seqs + 1],
            self._context_len.host[: shape.num_seqs],
            self._sample_rows.host[: shape.num_samples],
            self._scored_rows.host[: shape.num_scored],
        )

    def step(
        self, shape: StepShape, *, with_norms: Collection[int] = (), with_tables: Collection[int] = ()
    ) -> StepInput:
        """Return the step as tensors, valid until the buffers are filled again.

        `with_norms`, `with_tables`: slots whose adapters have their own norms, or their own embedding or head.
        """
        which_norm_T, own_tables = None, []
        for start, end, slot, first_sample, end_sample, first_scored, end_scored in (
            self._segments[:, : shape.num_segments].T.tolist() if with_norms or with_tables else ()
        ):
            if slot in with_norms:
                if which_norm_T is None:
                    which_norm_T = self._which_norm.host[: shape.num_tokens]
                    which_norm_T[:] = 0
                which_norm_T[start:end] = 1 + slot
            if slot in with_tables:
                samples, scored = slice(first_sample, end_sample), slice(first_scored, end_scored)
                own_tables.append(OwnTables(slot, slice(start, end), samples, scored))
        return replace(
            self._input(shape.num_tokens, shape.num_seqs, shape.num_samples, shape.num_scored),
            segments=self._lora(shape) if shape.num_segments else None,
            which_norm_T=None if which_norm_T is None else self._which_norm.first(shape.num_tokens),
            own_tables=tuple(own_tables),
        )

    def decode_step(self, shape: StepShape, size: int, scratch_page: int, *, has_lora: bool) -> StepInput:
        """Return a step of one token per sequence, all of which sample, padded with rows up to `size`.

        The padding rows are sequences of one token in a page of their own. A row has at most one adapter. has_lora:
        include tiles for LoRA, even if no row uses an adapter.
        """
        assert shape.num_tokens == shape.num_seqs == shape.num_samples <= size
        added = slice(shape.num_seqs, size)
        self._token_ids.host[added] = self._positions.host[added] = 0
        self._slot_mapping.host[added] = scratch_page * self._page_size
        self._page_table.host[added, 0] = scratch_page
        self._context_len.host[added] = 1
        self._query_start.host[: size + 1] = np.arange(size + 1)
        self._sample_rows.host[:size] = np.arange(size)
        step = self._input(size, size, size)
        if not has_lora:
            return step
        lists = self._divided(shape)
        self._tiles.host[: 6 * size + 1] = lists.packed(size, size).numpy()
        return replace(step, segments=lists.on(self._tiles.first(6 * size + 1), size, size))

    def _input(self, num_tokens: int, num_seqs: int, num_samples: int, num_scored: int = 0) -> StepInput:
        """Return the input without adapters."""
        return StepInput(
            token_ids_T=self._token_ids.first(num_tokens),
            positions_T=self._positions.first(num_tokens),
            slot_mapping_T=self._slot_mapping.first(num_tokens),
            page_table_SP=self._page_table.first(num_seqs),
            query_start_S1=self._query_start.first(num_seqs + 1),
            context_len_S=self._context_len.first(num_seqs),
            sample_rows=self._sample_rows.first(num_samples),
            scored_rows=self._scored_rows.first(num_scored),
            segments=None,
        )

    def _lora(self, shape: StepShape) -> LoraSegments | LoraTiles:
        if self._has_tiles:
            lists = self._divided(shape)
            return lists.on(send(lists.packed(), self._device))
        starts, ends, slots = torch.from_numpy(self._segments[:3, : shape.num_segments])
        return LoraSegments(starts, ends, slots, torch.from_numpy(self._weights[: shape.num_segments]))

    def _divided(self, shape: StepShape) -> TileLists:
        starts, ends, slots = self._segments[:3, : shape.num_segments].tolist()
        weights = self._weights[: shape.num_segments].tolist()
        return divide(starts, ends, slots, weights, block_rows_for(shape.num_tokens))
