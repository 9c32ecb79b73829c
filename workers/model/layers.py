"""The sharded layers. Each loads its own shard; tensor parallelism is only a group size to them.

Created empty: weights exist after `load`, in the form that the kernels read (see kernels/linear.py).

T tokens of the step, H hidden, I in features, O out features of this rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorafleet.kernels.linear import LinearWeight, gather_rows, linear, prepare
from lorafleet.kernels.lora import LoraSegments
from lorafleet.kernels.lora_tiles import LoraTiles
from lorafleet.workers.adapters.format import HostAdapter
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.model.lora import BaseLinear, LoraLinear, Part, SlotShape
from lorafleet.workers.model.slot_write import SlotRows
from lorafleet.workers.model.vocabulary import EmbeddingPart, HeadPart, IdRange
from lorafleet.workers.tp.group import TensorParallelGroup


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The storage format of a model's weights. `int8`: the decoder's linears as integers with a scale per output."""

    dtype: torch.dtype
    device: torch.device
    int8: bool = False

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class ColumnParallelLinear:
    """Several linears of one input (q,k,v or gate,up) as one, sharded over the outputs. No communication."""

    weight: LinearWeight
    bias_O: torch.Tensor | None

    def __init__(self, parts: tuple[Part, ...], num_in: int, *, bias: bool, format: WeightFormat) -> None:
        self._parts = parts
        self._num_in = num_in
        self._has_bias = bias
        self._format = format
        self.lora: LoraLinear | None = None

    def load(self, reader: CheckpointReader, prefix: str) -> None:
        num_out = sum(part.size for part in self._parts)
        weight_OI = self._format.empty(num_out, self._num_in)
        bias_O = self._format.empty(num_out) if self._has_bias else None
        begin = 0
        for part in self._parts:
            end = begin + part.size
            reader.read_into(weight_OI[begin:end], f"{prefix}.{part.name}.weight", rows=part.rows)
            if bias_O is not None:
                reader.read_into(bias_O[begin:end], f"{prefix}.{part.name}.bias", rows=part.rows)
            begin = end
        self.weight, self.bias_O = prepare(weight_OI, int8=self._format.int8), bias_O

    def add_slots(self, layer: int, shape: SlotShape) -> None:
        self.lora = LoraLinear(layer, self._parts, slice(0, self._num_in), shape)

    def slot_rows(self, adapter: HostAdapter, out: SlotRows) -> None:
        assert self.lora is not None
        self.lora.rows(adapter, BaseLinear(self.weight, self.bias_O, adds_bias=True, is_whole=True), out)

    def __call__(self, x_TI: torch.Tensor, segments: LoraSegments | LoraTiles | None, out_TO: torch.Tensor) -> None:
        """Write the result to `out_TO`, which is contiguous."""
        linear(x_TI, self.weight, self.bias_O, out_TO)
        if segments is not None and self.lora is not None:
            self.lora.add_(out_TO, x_TI, segments)


class RowParallelLinear:
    """A linear sharded over its inputs; one all-reduce sums the ranks' results, LoRA included."""

    weight: LinearWeight
    bias_O: torch.Tensor | None

    def __init__(
        self, name: str, columns: slice, num_out: int, *, bias: bool, format: WeightFormat, group: TensorParallelGroup
    ) -> None:
        """columns: this rank's input features."""
        self.name = name
        self._num_out = num_out
        self._has_bias = bias
        self._format = format
        self._group = group
        self._columns = columns
        self.lora: LoraLinear | None = None

    def load(self, reader: CheckpointReader, prefix: str) -> None:
        weight_OI = self._format.empty(self._num_out, self._columns.stop - self._columns.start)
        reader.read_into(weight_OI, f"{prefix}.{self.name}.weight", columns=self._columns)
        self.weight = prepare(weight_OI, int8=self._format.int8)
        self.bias_O = None
        if self._has_bias:
            self.bias_O = self._format.empty(self._num_out)
            reader.read_into(self.bias_O, f"{prefix}.{self.name}.bias")

    def add_slots(self, layer: int, shape: SlotShape) -> None:
        self.lora = LoraLinear(layer, (Part(self.name, 0, self._num_out),), self._columns, shape)

    def slot_rows(self, adapter: HostAdapter, out: SlotRows) -> None:
        assert self.lora is not None
        self.lora.rows(adapter, self._base(), out)

    def partial_squares(self, adapter: HostAdapter) -> torch.Tensor:
        """See `LoraLinear.partial_squares`."""
        assert self.lora is not None
        return self.lora.partial_squares(adapter, self._base())

    def __call__(self, x_TI: torch.Tensor, segments: LoraSegments | LoraTiles | None, out_TO: torch.Tensor) -> None:
        """Write the result to `out_TO`, which is contiguous."""
        # Only one rank adds the bias, so that the sum contains it once.
        linear(x_TI, self.weight, self.bias_O if self._group.rank == 0 else None, out_TO)
        if segments is not None and self.lora is not None:
            self.lora.add_(out_TO, x_TI, segments)
        self._group.all_reduce_(out_TO)

    def _base(self) -> BaseLinear:
        group = self._group
        return BaseLinear(self.weight, self.bias_O, adds_bias=group.rank == 0, is_whole=group.size == 1)


class VocabParallelEmbedding:
    """Token embeddings, the head, or (tied) both; each rank holds a range of the vocabulary. Never quantised."""

    weight: LinearWeight

    def __init__(
        self, vocab_size: int, hidden: int, *, is_head: bool, format: WeightFormat, group: TensorParallelGroup
    ) -> None:
        self._group = group
        self._hidden = hidden
        self._is_head = is_head
        self._format = format
        # The last rank's shard is shorter if the ranks do not divide the vocabulary.
        per_rank = -(-vocab_size // group.size)
        self._vocab_size = vocab_size
        self._per_rank = per_rank
        self._start = min(group.rank * per_rank, vocab_size)
        self._stop = min(self._start + per_rank, vocab_size)

    def load(self, reader: CheckpointReader, name: str) -> None:
        weight_VH = self._format.empty(self._stop - self._start, self._hidden)
        reader.read_into(weight_VH, name, rows=slice(self._start, self._stop))
        self.weight = prepare(weight_VH, packed=None if self._is_head else False)

    def ids(self, size: int) -> IdRange:
        """Return this rank's ids in an adapter's vocabulary of that size."""
        return IdRange(self._start, self._stop, self._vocab_size, size - self._vocab_size, self._group.rank == 0)

    def embed(self, token_ids_T: torch.Tensor, own: Sequence[tuple[slice, EmbeddingPart]] = ()) -> torch.Tensor:
        """Return embeddings [T, H]. `own`: rows whose adapters have their own; other rows use base ids only."""
        if self._group.size == 1 and not own:
            return gather_rows(self.weight, token_ids_T)
        local_T = token_ids_T - self._start
        elsewhere_T = (local_T < 0) | (local_T >= self._stop - self._start)
        x_TH = gather_rows(self.weight, local_T.masked_fill(elsewhere_T, 0)).masked_fill(elsewhere_T[:, None], 0.0)
        for rows, part in own:
            part.apply_(x_TH[rows], token_ids_T[rows])
        return self._group.all_reduce_(x_TH)

    def logits(
        self,
        x_TH: torch.Tensor,
        own: Sequence[tuple[slice, HeadPart]] = (),
        out_TV: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits [T, V] on every rank; wider if a row's adapter adds ids, which are -inf in other rows.

        out_TV: where to write them; only with one rank and no adapters' own heads.
        """
        assert out_TV is None or (self._group.size == 1 and not own)
        local_TX = linear(x_TH, self.weight, out_TO=out_TV) if not own else self._own_logits(x_TH, own)
        if self._group.size == 1:
            return local_TX
        num_own = self._stop - self._start
        padded_TV = F.pad(local_TX[:, :num_own], (0, self._per_rank - num_own))
        logits_TV = self._group.all_gather_columns(padded_TV)[:, : self._vocab_size]
        return torch.cat([logits_TV, local_TX[:, num_own:]], dim=1) if own else logits_TV

    def _own_logits(self, x_TH: torch.Tensor, own: Sequence[tuple[slice, HeadPart]]) -> torch.Tensor:
        """Return this rank's logits, then those of added ids."""
        num_own = self._stop - self._start
        num_added = max(part.ids.num_added for _, part in own)
        if num_added == 0 and all(part.weight is None for _, part in own):
            logits_TX = linear(x_TH, self.weight)
        else:
            logits_TX = x_TH.new_full((x_TH.shape[0], num_own + num_added), -torch.inf)
            uses_base_T = torch.ones(x_TH.shape[0], dtype=torch.bool, device=x_TH.device)
            for rows, part in own:
                uses_base_T[rows] = part.weight is None
            base_rows = uses_base_T.nonzero()[:, 0]
            if len(base_rows):
                logits_TX[base_rows, :num_own] = linear(x_TH[base_rows], self.weight)
        for rows, part in own:
            part.apply_(x_TH[rows], logits_TX[rows, : part.ids.size])
        return logits_TX
