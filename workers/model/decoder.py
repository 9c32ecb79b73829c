"""The decoder of the Llama family, configured by a `ModelSpec`: Llama, SmolLM2, Mistral, Qwen2, Qwen3.

Prefill, chunked prefill and decode share one path: rows of tokens, each request's rows adjacent, keys and values in
pages. There is one call per op and layer; the kernels handle adapters and requests, never a Python loop.

T tokens of the step, H hidden, E fused q,k,v features of this rank, S sequences.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from lorafleet.kernels import native
from lorafleet.kernels.activation import silu_mul
from lorafleet.kernels.attention import paged_attention
from lorafleet.kernels.lora import LoraSegments
from lorafleet.kernels.norm import fused_add_rms_norm_, rms_norm
from lorafleet.kernels.rope import rope_kv_write_
from lorafleet.workers.adapters.format import HostAdapter
from lorafleet.workers.adapters.modules import EMBEDDING, FINAL_NORM, NO_LAYER
from lorafleet.workers.model.architecture import ModelSpec
from lorafleet.workers.model.kv_cache import KVCache
from lorafleet.workers.model.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, WeightFormat
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.model.lora import Part, SlotShape
from lorafleet.workers.model.memory_plan import SCORED_AT_ONCE
from lorafleet.workers.model.norm import Norm
from lorafleet.workers.model.rope import cos_sin_table
from lorafleet.workers.model.shards import linear_shards
from lorafleet.workers.model.slot_write import PreparedForms, SlotRows, SlotWrite
from lorafleet.workers.model.step_input import StepInput
from lorafleet.workers.model.vocabulary import HeadPart, VocabularyPart, embedding_squares, make_part
from lorafleet.workers.tp.group import TensorParallelGroup

# A recording of SmolLM2's 30 layers takes 50 KB. Steps of more tokens spend little time in Python.
_MAX_KEPT_TOKENS = 128
_MAX_RECORDINGS = 256
_ROW_PARALLEL = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """The layers' intermediate results, allocated once for the widest step; all contiguous. F features of the MLP."""

    residual_TH: torch.Tensor
    x_TH: torch.Tensor
    qkv_TE: torch.Tensor
    attended_TQ: torch.Tensor
    gate_up_T2F: torch.Tensor
    inner_TF: torch.Tensor

    @classmethod
    def allocate(
        cls, spec: ModelSpec, num_tokens: int, format: WeightFormat, group: TensorParallelGroup
    ) -> Activations:
        shards = linear_shards(spec, group.rank, group.size)
        q_size, kv_size = shards["q_proj"].num_outputs, shards["k_proj"].num_outputs
        hidden, inner = spec.hidden_size, shards["up_proj"].num_outputs
        widths = {
            "residual_TH": hidden,
            "x_TH": hidden,
            "qkv_TE": q_size + 2 * kv_size,
            "attended_TQ": q_size,
            "gate_up_T2F": 2 * inner,
            "inner_TF": inner,
        }
        return cls(**{name: format.empty(num_tokens, width) for name, width in widths.items()})

    def first(self, num_tokens: int) -> Activations:
        """Return views of the first rows, at the same addresses."""
        return Activations(**{name: getattr(self, name)[:num_tokens] for name in self.__slots__})


class DecoderLayer:
    """Attention and MLP with their norms; the residual stream is passed along and updated in place."""

    def __init__(self, index: int, spec: ModelSpec, group: TensorParallelGroup, format: WeightFormat) -> None:
        self._index = index
        self._eps = spec.norm_eps
        self._window = spec.windows[index]
        self._scale = spec.head_dim**-0.5
        dim, hidden = spec.head_dim, spec.hidden_size
        shards = linear_shards(spec, group.rank, group.size)
        self._q_size = shards["q_proj"].num_outputs
        self._num_q_heads = self._q_size // dim
        self._num_kv_heads = shards["k_proj"].num_outputs // dim

        def columns(*names: str, bias: bool) -> ColumnParallelLinear:
            parts = tuple(Part(name, shards[name].outputs.start, shards[name].outputs.stop) for name in names)
            return ColumnParallelLinear(parts, hidden, bias=bias, format=format)

        def rows(name: str, *, bias: bool) -> RowParallelLinear:
            return RowParallelLinear(name, shards[name].inputs, hidden, bias=bias, format=format, group=group)

        self.qkv = columns("q_proj", "k_proj", "v_proj", bias=spec.qkv_bias)
        self.o = rows("o_proj", bias=spec.o_bias)
        self.gate_up = columns("gate_proj", "up_proj", bias=spec.mlp_bias)
        self.down = rows("down_proj", bias=spec.mlp_bias)
        self._input_norm = Norm(index, "input_layernorm", format.empty(hidden))
        self._post_norm = Norm(index, "post_attention_layernorm", format.empty(hidden))
        self._q_norm = Norm(index, "q_norm", format.empty(dim)) if spec.qk_norm else None
        self._k_norm = Norm(index, "k_norm", format.empty(dim)) if spec.qk_norm else None

    def linears(self) -> tuple[ColumnParallelLinear | RowParallelLinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def norms(self) -> tuple[Norm, ...]:
        every = self._input_norm, self._post_norm, self._q_norm, self._k_norm
        return tuple(norm for norm in every if norm is not None)

    def load(self, reader: CheckpointReader) -> None:
        prefix = f"model.layers.{self._index}"
        self.qkv.load(reader, f"{prefix}.self_attn")
        self.o.load(reader, f"{prefix}.self_attn")
        self.gate_up.load(reader, f"{prefix}.mlp")
        self.down.load(reader, f"{prefix}.mlp")
        for norm in self.norms():
            norm.load(reader)

    def add_slots(self, shape: SlotShape) -> None:
        for linear in self.linears():
            linear.add_slots(self._index, shape)
        for norm in self.norms():
            norm.add_slots(shape.num_slots)

    def slot_rows(self, adapter: HostAdapter, out: SlotRows) -> None:
        for linear in self.linears():
            linear.slot_rows(adapter, out)

    def forward(self, work: Activations, step: StepInput, cache: KVCache, cos_sin: torch.Tensor) -> None:
        """Update `work`: the residual stream, and in x_TH the term to be added to it next."""
        segments = step.segments
        which_norm_T = step.which_norm_T
        if self._index == 0:  # nothing to add yet
            rms_norm(work.residual_TH, self._input_norm.weight_WH, self._eps, work.x_TH, which_norm_T)
        else:
            fused_add_rms_norm_(work.x_TH, work.residual_TH, self._input_norm.weight_WH, self._eps, which_norm_T)
        keys, values = cache.keys[self._index], cache.values[self._index]
        self.qkv(work.x_TH, segments, work.qkv_TE)
        rope_kv_write_(
            work.qkv_TE,
            cos_sin,
            step.positions_T,
            keys,
            values,
            step.slot_mapping_T,
            self._num_q_heads,
            self._num_kv_heads,
            None if self._q_norm is None else self._q_norm.weight_WH,
            None if self._k_norm is None else self._k_norm.weight_WH,
            self._eps,
            which_norm_T,
        )
        paged_attention(
            work.qkv_TE[:, : self._q_size],
            keys,
            values,
            step.page_table_SP,
            step.query_start_S1,
            step.context_len_S,
            self._num_q_heads,
            self._scale,
            self._window,
            work.attended_TQ,
        )
        self.o(work.attended_TQ, segments, work.x_TH)
        fused_add_rms_norm_(work.x_TH, work.residual_TH, self._post_norm.weight_WH, self._eps, which_norm_T)
        self.gate_up(work.x_TH, segments, work.gate_up_T2F)
        silu_mul(work.gate_up_T2F, work.inner_TF)
        self.down(work.inner_TF, segments, work.x_TH)


class Decoder:
    """The whole model on one rank. Created empty; `load` fills it.

    If all kernels are native, the layers' calls are recorded and run as one. Recordings of small steps are kept for the
    next step of the same shape (as CUDA graphs on a GPU), since several hundred calls from Python cost a small model a
    quarter of its step.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        max_model_len: int,
        max_num_tokens: int,
        format: WeightFormat,
        group: TensorParallelGroup,
        enforce_eager: bool = False,
    ) -> None:
        """`max_num_tokens`: per step. enforce_eager: never record a step."""
        self._enforce_eager = enforce_eager
        self.spec = spec
        self._group = group
        self._eps = spec.norm_eps
        self._embedding = VocabParallelEmbedding(
            spec.vocab_size, spec.hidden_size, is_head=spec.tie_embeddings, format=format, group=group
        )
        self._head = (
            self._embedding
            if spec.tie_embeddings
            else VocabParallelEmbedding(spec.vocab_size, spec.hidden_size, is_head=True, format=format, group=group)
        )
        self._layers = [DecoderLayer(i, spec, group, format) for i in range(spec.num_layers)]
        self._norm = Norm(NO_LAYER, FINAL_NORM, format.empty(spec.hidden_size))
        self._cos_sin_MD = cos_sin_table(spec, max_model_len).to(format.device)
        self._work = Activations.allocate(spec, max_num_tokens, format, group)
        self._recordings: OrderedDict[Hashable, native.Recording] = OrderedDict()  # least recently used first
        self._lora_dtype = format.dtype
        self._prepared = PreparedForms()
        self.with_norms: set[int] = set()  # slots whose adapters have their own norms
        self.tables: dict[int, VocabularyPart] = {}  # by slot, for adapters with their own embedding or head

    def load(self, reader: CheckpointReader) -> None:
        """Read this rank's shard of the weights. Raises `ModelError`."""
        self._embedding.load(reader, "model.embed_tokens.weight")
        if self._head is not self._embedding:
            self._head.load(reader, "lm_head.weight")
        self._norm.load(reader)
        for layer in self._layers:
            layer.load(reader)
        linears = (linear for layer in self._layers for linear in layer.linears())
        self.is_native = all(linear.weight.is_packed for linear in linears)
        self._is_recordable = self.is_native and self._group.size == 1 and not self._enforce_eager

    def add_slots(self, shape: SlotShape) -> None:
        """Allocate adapter slots in every linear and norm. Call before `load`."""
        self._lora_dtype = shape.dtype
        self._norm.add_slots(shape.num_slots)
        for layer in self._layers:
            layer.add_slots(shape)

    def prepare_adapter(self, slot: int, adapter: HostAdapter) -> SlotWrite:
        """Prepare the write of an adapter into a slot that no request uses. The base weights must be loaded.

        May run on another thread during `forward`.
        """
        prepared = self._prepared.get(adapter.form)
        if prepared is None:
            out = SlotRows()
            for layer in self._layers:
                layer.slot_rows(adapter, out)
            if adapter.norm_weights:
                for norm in (self._norm, *(norm for layer in self._layers for norm in layer.norms())):
                    norm.slot_rows(adapter, out)
            prepared = out.copies(adapter.storage())
            self._prepared.put(adapter.form, prepared)
        part = None
        if adapter.tables:
            ids = self._embedding.ids(adapter.vocab_size)
            part = make_part(adapter, ids, self._embedding.weight, self._head.weight, self._lora_dtype)

        def commit() -> None:
            if adapter.norm_weights:
                self.with_norms.add(slot)
            if part is not None:
                self.tables[slot] = part

        return SlotWrite(slot, adapter, prepared, commit)

    def is_prepared(self, adapter: HostAdapter) -> bool:
        """Return whether `prepare_adapter` finds its list of copies cached and has nothing else to prepare."""
        return not adapter.tables and self._prepared.get(adapter.form) is not None

    def split_norms(self, adapter: HostAdapter) -> list[tuple[int, str]]:
        """Return the keys of DoRA's norms that are sums over the ranks; all are [H], in the same order on every rank.

        They must be in `HostAdapter.norms` before `prepare_adapter`.
        """
        if self._group.size == 1:
            return []
        changes = {(layer, name): change for (layer, name), change in adapter.weights.items() if name in _ROW_PARALLEL}
        table = adapter.tables.get(EMBEDDING)
        if table is not None and table.lora is not None:
            changes[NO_LAYER, EMBEDDING] = table.lora
        return sorted(key for key, change in changes.items() if change.magnitude_O is not None)

    def partial_squares(self, adapter: HostAdapter) -> torch.Tensor:
        """Return this rank's summands, [split norms, H]; a norm is the square root of the sum over the ranks."""
        rows = []
        for index, name in self.split_norms(adapter):
            if index == NO_LAYER:
                ids = self._embedding.ids(adapter.vocab_size)
                rows.append(embedding_squares(adapter.tables[EMBEDDING], ids, self._embedding.weight))
            else:
                layer = self._layers[index]
                rows.append((layer.o if name == layer.o.name else layer.down).partial_squares(adapter))
        return torch.stack(rows)

    def clear_slot(self, slot: int) -> None:
        """Free the embedding and the head of a slot's adapter."""
        self.tables.pop(slot, None)
        self.with_norms.discard(slot)

    def forward(
        self,
        step: StepInput,
        cache: KVCache,
        out_SV: torch.Tensor | None = None,
        score: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Run one step; return logits [step.sample_rows, V] in the model's dtype, for the rows that sample.

        They are wider if a row's adapter adds ids (see `VocabParallelEmbedding.logits`). out_SV: where to write them,
        only for a step in which no adapter has its own head. score: called with the logits of the scored rows, in
        order, some rows at a time.
        """
        work = self._work.first(step.token_ids_T.shape[0])
        embeddings, heads = [], []
        for own in step.own_tables:
            part = self.tables[own.slot]
            if part.embedding is not None:
                embeddings.append((own.rows, part.embedding))
            if part.head is not None:
                heads.append((own, part.head))
        work.residual_TH.copy_(self._embedding.embed(step.token_ids_T, embeddings))
        self._run_layers(work, step, cache)
        num_scored = len(step.scored_rows)
        for first in range(0, num_scored, SCORED_AT_ONCE):  # on every rank, since the head is sharded
            piece = slice(first, min(first + SCORED_AT_ONCE, num_scored))
            own_heads = [(_within(own.scored, piece), head) for own, head in heads]
            logits_PV = self._logits(work, step, step.scored_rows[piece], own_heads)
            if score is not None:
                score(logits_PV)
        return self._logits(work, step, step.sample_rows, [(own.samples, head) for own, head in heads], out_SV)

    def _logits(
        self,
        work: Activations,
        step: StepInput,
        rows_S: torch.Tensor,
        heads: Sequence[tuple[slice, HeadPart]],
        out_SV: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of some rows after the last layer. heads: adapters' own, by indices into `rows_S`."""
        x_SH, residual_SH = work.x_TH.index_select(0, rows_S), work.residual_TH.index_select(0, rows_S)
        which_norm_S = None if step.which_norm_T is None else step.which_norm_T.index_select(0, rows_S)
        fused_add_rms_norm_(x_SH, residual_SH, self._norm.weight_WH, self._eps, which_norm_S)
        used = [(part_S, head) for part_S, head in heads if part_S.start < part_S.stop]
        return self._head.logits(x_SH, used, out_SV)

    def _run_layers(self, work: Activations, step: StepInput, cache: KVCache) -> None:
        kernels = native.library()
        if kernels is None or not self._is_recordable:
            for layer in self._layers:
                layer.forward(work, step, cache, self._cos_sin_MD)
            return
        num_tokens = work.x_TH.shape[0]
        # Everything in the calls that can change; the addresses never do (see StepBuffers, Activations).
        num_segments = step.segments.slot_G.shape[0] if isinstance(step.segments, LoraSegments) else 0
        shape = (kernels, num_tokens, step.context_len_S.shape[0], num_segments, step.which_norm_T is None)
        recording = self._recordings.pop(shape, None)
        if recording is None:
            with native.record() as recording:
                for layer in self._layers:
                    layer.forward(work, step, cache, self._cos_sin_MD)
        recording.run()
        if num_tokens <= _MAX_KEPT_TOKENS:
            self._recordings[shape] = recording
            if len(self._recordings) > _MAX_RECORDINGS:
                self._recordings.popitem(last=False)


def _within(rows: slice, piece: slice) -> slice:
    """Return the rows that are in a piece, counted from its start."""
    return slice(max(rows.start, piece.start) - piece.start, min(rows.stop, piece.stop) - piece.start)
