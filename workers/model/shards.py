"""Shards of the linears, per rank. Pure arithmetic; the vocabulary's ranges are in layers.py.

Column-parallel linears (q, k, v, gate, up) are split over their outputs, row-parallel ones (o, down) over their inputs.
LoRA follows: A is split with the inputs, B with the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.workers.errors import ConfigError
from lorafleet.workers.model.architecture import ModelSpec


@dataclass(frozen=True, slots=True)
class LinearShard:
    """A rank's input and output features of one linear."""

    inputs: slice
    outputs: slice

    @property
    def num_inputs(self) -> int:
        return int(self.inputs.stop - self.inputs.start)

    @property
    def num_outputs(self) -> int:
        return int(self.outputs.stop - self.outputs.start)


def linear_shards(spec: ModelSpec, rank: int = 0, size: int = 1) -> dict[str, LinearShard]:
    """Return equal shards by checkpoint name. Raises `ConfigError` if `size` does not divide them."""
    q_heads, kv_heads = _head_ranges(spec, rank, size)
    if spec.intermediate_size % size:
        raise ConfigError(
            f"--tensor-parallel-size is {size}, which does not divide the model's intermediate_size of "
            f"{spec.intermediate_size}."
        )
    dim, inner_size = spec.head_dim, spec.intermediate_size // size
    hidden = slice(0, spec.hidden_size)
    q = slice(q_heads.start * dim, q_heads.stop * dim)
    kv = slice(kv_heads.start * dim, kv_heads.stop * dim)
    inner = slice(rank * inner_size, (rank + 1) * inner_size)
    return {
        "q_proj": LinearShard(hidden, q),
        "k_proj": LinearShard(hidden, kv),
        "v_proj": LinearShard(hidden, kv),
        "o_proj": LinearShard(q, hidden),
        "gate_proj": LinearShard(hidden, inner),
        "up_proj": LinearShard(hidden, inner),
        "down_proj": LinearShard(inner, hidden),
    }


def _head_ranges(spec: ModelSpec, rank: int, size: int) -> tuple[slice, slice]:
    """Return a rank's query and key-value heads; key-value heads are replicated if there are fewer than ranks."""
    if spec.num_heads % size:
        raise ConfigError(
            f"--tensor-parallel-size is {size}, which does not divide the model's {spec.num_heads} attention heads. "
            f"Use one of {[n for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0]}."
        )
    num_q = spec.num_heads // size
    q_heads = slice(rank * num_q, (rank + 1) * num_q)
    if spec.num_kv_heads >= size:
        if spec.num_kv_heads % size:
            raise ConfigError(
                f"--tensor-parallel-size is {size}, which does not divide the model's {spec.num_kv_heads} key-value "
                "heads."
            )
        num_kv = spec.num_kv_heads // size
        return q_heads, slice(rank * num_kv, (rank + 1) * num_kv)
    if size % spec.num_kv_heads:
        raise ConfigError(
            f"--tensor-parallel-size is {size}: the model's {spec.num_kv_heads} key-value heads cannot be replicated "
            "evenly over so many ranks."
        )
    head = rank * spec.num_kv_heads // size
    return q_heads, slice(head, head + 1)
