"""A step plan as the tensors that the decoder and the sampler read. The only place where requests become rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorafleet.kernels.dispatch import uses_triton
from lorafleet.kernels.lora import LoraSegments
from lorafleet.kernels.lora_tiles import LoraTiles, TileLists, block_rows_for, divide
from lorafleet.workers.engine.batch import Scheduled
from lorafleet.workers.model.transfer import send

# T tokens of the step, S sequences in it, P pages of the longest sequence


@dataclass(frozen=True, slots=True)
class OwnTables:
    """A segment whose adapter has an embedding or a head of its own."""

    slot: int
    rows: slice
    samples: slice  # among the rows that sample


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """All of one step. Sequence s has the rows query_start[s] to query_start[s + 1]."""

    token_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    slot_mapping_T: torch.Tensor  # int64: page * page_size + offset, where the token's key and value go
    page_table_SP: torch.Tensor  # int32, each sequence's pages in order; behind the last one undefined
    query_start_S1: torch.Tensor  # int32
    context_len_S: torch.Tensor  # int32: keys to attend to, this step's included
    sample_rows: torch.Tensor  # int64: rows whose logits are wanted
    segments: LoraSegments | LoraTiles | None  # None: nobody in this step uses an adapter, no LoRA op runs
    which_norm_T: torch.Tensor | None = None  # int32, as model/norm.py counts; None: all rows have the base model's
    own_tables: tuple[OwnTables, ...] = ()


@dataclass(frozen=True, slots=True)
class StepShape:
    """How much of the buffers a step fills."""

    num_tokens: int
    num_seqs: int
    num_pages: int  # of the longest sequence
    num_samples: int
    num_segments: int


class _Area:
    """Numbers on the host and, for another device, a twin of them there. Both stay where they are."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        tensor = torch.zeros(shape, dtype=dtype)
        self.host: npt.NDArray[Any] = tensor.numpy()
        self._tensor = tensor
        self._device = device
        self._twin = None if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)

    def first(self, count: int) -> torch.Tensor:
        """On the device, as the host has them now."""
        if self._twin is None:
            return self._tensor[:count]
        return send(self._tensor[:count], self._device, into=self._twin[:count])


class StepBuffers:
    """The memory of every step's input, allocated once for the largest step.

    A step's tensors are views at the same addresses each time, and the page table's rows lie equally far apart. What is
    sent to another device is on its way when a method returns, and the buffers may be filled again.
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
        """max_composed: adapters of one sequence."""
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
        self._which_norm = area(max_num_tokens)
        self._tiles = area(6 * max_num_seqs + 1)  # of decode steps
        # First row, behind the last, slot, first row that samples, behind the last.
        self._segments = np.zeros((5, max_num_segments), np.int32)
        self._weights = np.ones(max_num_segments, np.float32)

    def fill(self, scheduled: Sequence[Scheduled]) -> StepShape:
        """Lay out a non-empty plan that is grouped by adapter slots, as `StepPlan` promises.

        A segment is rows of one slot's adapter next to each other; rows before a request's `adapter_start` are in none,
        those of a composition in one for each of its adapters, in the order of their digests.
        """
        page_size = self._page_size
        token_ids, positions, slot_mapping = self._token_ids.host, self._positions.host, self._slot_mapping.host
        num_samples = num_segments = num_pages = row = 0
        applied: tuple[tuple[int, ...], tuple[float, ...]] = (), ()  # to the last row so far: slots and their weights
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
            before, applied = applied, (entry.slots, request.weights) if start < end else ((), ())
            if applied == before and start == row:
                self._segments[1, num_segments - len(entry.slots) : num_segments] = end
                self._segments[4, num_segments - len(entry.slots) : num_segments] = num_samples
            else:
                for slot, weight in zip(*applied, strict=True):
                    self._segments[:, num_segments] = start, end, slot, first_sample, num_samples
                    self._weights[num_segments] = weight
                    num_segments += 1
            row = end
        return StepShape(row, len(scheduled), num_pages, num_samples, num_segments)

    def pack(self, shape: StepShape) -> npt.NDArray[np.int32]:
        """What the buffers hold of a step, for another rank."""
        pages = self._page_table.host[: shape.num_seqs, : shape.num_pages]
        parts = *self._parts(shape), pages, self._segments[:, : shape.num_segments]
        weights = self._weights[: shape.num_segments].view(np.int32)
        header = (shape.num_tokens, shape.num_seqs, shape.num_pages, shape.num_samples, shape.num_segments)
        return np.concatenate([np.array(header), *(part.reshape(-1) for part in parts), weights], dtype=np.int32)

    def unpack(self, packed: npt.NDArray[np.int32]) -> StepShape:
        """Take over what `pack` made of another rank's buffers."""
        shape = StepShape(*packed[:5].tolist())
        begin = 5
        pages = self._page_table.host[: shape.num_seqs, : shape.num_pages]
        weights = self._weights[: shape.num_segments].view(np.int32)
        for part in (*self._parts(shape), pages, self._segments[:, : shape.num_segments], weights):
            part[...] = packed[begin : begin + part.size].reshape(part.shape)
            begin += part.size
        assert begin == len(packed)
        return shape

    def _parts(self, shape: StepShape) -> tuple[npt.NDArray[Any], ...]:
        """Those of one dimension. None of their numbers needs more than 31 bits."""
        return (
            self._token_ids.host[: shape.num_tokens],
            self._positions.host[: shape.num_tokens],
            self._slot_mapping.host[: shape.num_tokens],
            self._query_start.host[: shape.num_seqs + 1],
            self._context_len.host[: shape.num_seqs],
            self._sample_rows.host[: shape.num_samples],
        )

    def step(
        self, shape: StepShape, *, with_norms: Collection[int] = (), with_tables: Collection[int] = ()
    ) -> StepInput:
        """The step as tensors, which are good until the buffers are filled again.

        `with_norms`, `with_tables`: slots whose adapters have norms, or an embedding or a head, of their own.
        """
        which_norm_T, own_tables = None, []
        for start, end, slot, *samples in (
            self._segments[:, : shape.num_segments].T.tolist() if with_norms or with_tables else ()
        ):
            if slot in with_norms:
                if which_norm_T is None:
                    which_norm_T = self._which_norm.host[: shape.num_tokens]
                    which_norm_T[:] = 0
                which_norm_T[start:end] = 1 + slot
            if slot in with_tables:
                own_tables.append(OwnTables(slot, slice(start, end), slice(*samples)))
        return replace(
            self._input(shape.num_tokens, shape.num_seqs, shape.num_samples),
            segments=self._lora(shape) if shape.num_segments else None,
            which_norm_T=None if which_norm_T is None else self._which_norm.first(shape.num_tokens),
            own_tables=tuple(own_tables),
        )

    def decode_step(self, shape: StepShape, size: int, scratch_page: int, *, has_lora: bool) -> StepInput:
        """A step of one token for each sequence, all of which sample, with rows added to it up to `size`.

        Those are sequences of one token in a page that nobody else uses. Of adapters there may be one for each row;
        has_lora, which a step without any may have too: there are tiles for them.
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

    def _input(self, num_tokens: int, num_seqs: int, num_samples: int) -> StepInput:
        """Without adapters."""
        return StepInput(
            token_ids_T=self._token_ids.first(num_tokens),
            positions_T=self._positions.first(num_tokens),
            slot_mapping_T=self._slot_mapping.first(num_tokens),
            page_table_SP=self._page_table.first(num_seqs),
            query_start_S1=self._query_start.first(num_seqs + 1),
            context_len_S=self._context_len.first(num_seqs),
            sample_rows=self._sample_rows.first(num_samples),
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
