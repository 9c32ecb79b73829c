"""The sharded layers. Each knows its shard and loads it itself; tensor parallelism is only a group size.

T tokens of the step, H hidden, I in features, O out features of this rank, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorafleet.kernels.lora import LoraSegments
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.model.lora import LoraLinear, Part, SlotShape
from lorafleet.workers.tp.group import TensorParallelGroup


class ColumnParallelLinear:
    """Several linears of one input (q,k,v or gate,up) as one, sharded over their outputs. No communication."""

    def __init__(
        self, parts: tuple[Part, ...], num_in: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._parts = parts
        num_out = sum(part.size for part in parts)
        self.weight_OI = torch.empty(num_out, num_in, dtype=dtype, device=device)
        self.bias_O = torch.empty(num_out, dtype=dtype, device=device) if bias else None
        self.lora: LoraLinear | None = None

    def load(self, reader: CheckpointReader, prefix: str) -> None:
        begin = 0
        for part in self._parts:
            end = begin + part.size
            reader.read_into(self.weight_OI[begin:end], f"{prefix}.{part.name}.weight", rows=part.rows)
            if self.bias_O is not None:
                reader.read_into(self.bias_O[begin:end], f"{prefix}.{part.name}.bias", rows=part.rows)
            begin = end

    def add_slots(self, layer: int, shape: SlotShape) -> LoraLinear:
        self.lora = LoraLinear(layer, self._parts, slice(0, self.weight_OI.shape[1]), shape)
        return self.lora

    def __call__(self, x_TI: torch.Tensor, segments: LoraSegments | None) -> torch.Tensor:
        y_TO = F.linear(x_TI, self.weight_OI, self.bias_O)
        if segments is not None and self.lora is not None:
            self.lora.add_(y_TO, x_TI, segments)
        return y_TO


class RowParallelLinear:
    """A linear sharded over its inputs; one all-reduce sums the ranks' parts, LoRA's included."""

    def __init__(
        self,
        name: str,
        num_in: int,
        num_out: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: TensorParallelGroup,
    ) -> None:
        self._name = name
        self._group = group
        self._columns = slice(*group.shard(num_in, f"{name}'s input"))
        local_in = self._columns.stop - self._columns.start
        self.weight_OI = torch.empty(num_out, local_in, dtype=dtype, device=device)
        self.bias_O = torch.empty(num_out, dtype=dtype, device=device) if bias else None
        self.lora: LoraLinear | None = None

    def load(self, reader: CheckpointReader, prefix: str) -> None:
        reader.read_into(self.weight_OI, f"{prefix}.{self._name}.weight", columns=self._columns)
        if self.bias_O is not None:
            reader.read_into(self.bias_O, f"{prefix}.{self._name}.bias")

    def add_slots(self, layer: int, shape: SlotShape) -> LoraLinear:
        parts = (Part(self._name, 0, self.weight_OI.shape[0]),)
        self.lora = LoraLinear(layer, parts, self._columns, shape)
        return self.lora

    def __call__(self, x_TI: torch.Tensor, segments: LoraSegments | None) -> torch.Tensor:
        y_TO = F.linear(x_TI, self.weight_OI)
        if segments is not None and self.lora is not None:
            self.lora.add_(y_TO, x_TI, segments)
        self._group.all_reduce_(y_TO)
        return y_TO if self.bias_O is None else y_TO.add_(self.bias_O)


class VocabParallelEmbedding:
    """Token embeddings, and, when tied, the head: each rank holds a range of the vocabulary."""

    def __init__(
        self, vocab_size: int, hidden: int, *, dtype: torch.dtype, device: torch.device, group: TensorParallelGroup
    ) -> None:
        self._group = group
        # The last rank's shard is the shorter one when the ranks do not divide the vocabulary.
        per_rank = -(-vocab_size // group.size)
        self._vocab_size = vocab_size
        self._per_rank = per_rank
        self._start = min(group.rank * per_rank, vocab_size)
        self._stop = min(self._start + per_rank, vocab_size)
        self.weight_VH = torch.empty(self._stop - self._start, hidden, dtype=dtype, device=device)

    def load(self, reader: CheckpointReader, name: str) -> None:
        reader.read_into(self.weight_VH, name, rows=slice(self._start, self._stop))

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        if self._group.size == 1:
            return F.embedding(token_ids_T, self.weight_VH)
        local_T = token_ids_T - self._start
        elsewhere_T = (local_T < 0) | (local_T >= self.weight_VH.shape[0])
        x_TH = F.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight_VH)
        return self._group.all_reduce_(x_TH.masked_fill(elsewhere_T[:, None], 0.0))

    def logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, V] on every rank."""
        local_TV = F.linear(x_TH, self.weight_VH)
        if self._group.size == 1:
            return local_TV
        padded_TV = F.pad(local_TV, (0, self._per_rank - local_TV.shape[1]))
        return self._group.all_gather_columns(padded_TV)[:, : self._vocab_size]
