"""The sharded layers. Each knows its shard and loads it itself; tensor parallelism is only a group size.

Created empty: weights exist from `load` on, in the form that the kernels read (see kernels/linear.py).

T tokens of the step, H hidden, I in features, O out features of this rank, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorafleet.kernels.linear import LinearWeight, gather_rows, linear, prepare
from lorafleet.kernels.lora import LoraSegments
from lorafleet.workers.adapters.format import HostAdapter
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.model.lora import BaseLinear, LoraLinear, Part, SlotShape
from lorafleet.workers.tp.group import TensorParallelGroup


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What all weights of a model are kept in. `int8`: the decoder's linears as integers with a scale per output."""

    dtype: torch.dtype
    device: torch.device
    int8: bool = False

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class ColumnParallelLinear:
    """Several linears of one input (q,k,v or gate,up) as one, sharded over their outputs. No communication."""

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

    def write_adapter(self, slot: int, adapter: HostAdapter) -> None:
        assert self.lora is not None
        self.lora.write(slot, adapter, BaseLinear(self.weight, self.bias_O, adds_bias=True, is_whole=True))

    def __call__(self, x_TI: torch.Tensor, segments: LoraSegments | None, out_TO: torch.Tensor) -> None:
        """Into `out_TO`, contiguous."""
        linear(x_TI, self.weight, self.bias_O, out_TO)
        if segments is not None and self.lora is not None:
            self.lora.add_(out_TO, x_TI, segments)


class RowParallelLinear:
    """A linear sharded over its inputs; one all-reduce sums the ranks' parts, LoRA's included."""

    weight: LinearWeight
    bias_O: torch.Tensor | None

    def __init__(
        self, name: str, num_in: int, num_out: int, *, bias: bool, format: WeightFormat, group: TensorParallelGroup
    ) -> None:
        self._name = name
        self._num_out = num_out
        self._has_bias = bias
        self._format = format
        self._group = group
        self._columns = slice(*group.shard(num_in, f"{name}'s input"))
        self.lora: LoraLinear | None = None

    def load(self, reader: CheckpointReader, prefix: str) -> None:
        weight_OI = self._format.empty(self._num_out, self._columns.stop - self._columns.start)
        reader.read_into(weight_OI, f"{prefix}.{self._name}.weight", columns=self._columns)
        self.weight = prepare(weight_OI, int8=self._format.int8)
        self.bias_O = None
        if self._has_bias:
            self.bias_O = self._format.empty(self._num_out)
            reader.read_into(self.bias_O, f"{prefix}.{self._name}.bias")

    def add_slots(self, layer: int, shape: SlotShape) -> None:
        self.lora = LoraLinear(layer, (Part(self._name, 0, self._num_out),), self._columns, shape)

    def write_adapter(self, slot: int, adapter: HostAdapter) -> None:
        assert self.lora is not None
        group = self._group
        base = BaseLinear(self.weight, self.bias_O, adds_bias=group.rank == 0, is_whole=group.size == 1)
        self.lora.write(slot, adapter, base)

    def __call__(self, x_TI: torch.Tensor, segments: LoraSegments | None, out_TO: torch.Tensor) -> None:
        """Into `out_TO`, contiguous."""
        # One rank adds the bias, so that the sum over all holds it once.
        linear(x_TI, self.weight, self.bias_O if self._group.rank == 0 else None, out_TO)
        if segments is not None and self.lora is not None:
            self.lora.add_(out_TO, x_TI, segments)
        self._group.all_reduce_(out_TO)


class VocabParallelEmbedding:
    """Token embeddings, the head, or (tied) both: each rank holds a range of the vocabulary. Never in integers."""

    weight: LinearWeight

    def __init__(
        self, vocab_size: int, hidden: int, *, is_head: bool, format: WeightFormat, group: TensorParallelGroup
    ) -> None:
        self._group = group
        self._hidden = hidden
        self._is_head = is_head
        self._format = format
        # The last rank's shard is the shorter one when the ranks do not divide the vocabulary.
        per_rank = -(-vocab_size // group.size)
        self._vocab_size = vocab_size
        self._per_rank = per_rank
        self._start = min(group.rank * per_rank, vocab_size)
        self._stop = min(self._start + per_rank, vocab_size)

    def load(self, reader: CheckpointReader, name: str) -> None:
        weight_VH = self._format.empty(self._stop - self._start, self._hidden)
        reader.read_into(weight_VH, name, rows=slice(self._start, self._stop))
        self.weight = prepare(weight_VH, packed=None if self._is_head else False)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        if self._group.size == 1:
            return gather_rows(self.weight, token_ids_T)
        local_T = token_ids_T - self._start
        elsewhere_T = (local_T < 0) | (local_T >= self._stop - self._start)
        x_TH = gather_rows(self.weight, local_T.masked_fill(elsewhere_T, 0))
        return self._group.all_reduce_(x_TH.masked_fill(elsewhere_T[:, None], 0.0))

    def logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, V] on every rank."""
        local_TV = linear(x_TH, self.weight)
        if self._group.size == 1:
            return local_TV
        padded_TV = F.pad(local_TV, (0, self._per_rank - local_TV.shape[1]))
        return self._group.all_gather_columns(padded_TV)[:, : self._vocab_size]
