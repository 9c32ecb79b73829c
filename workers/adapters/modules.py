"""The modules that an adapter may change, by name. Those of no layer count as of layer -1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Where a decoder layer keeps its linears, by checkpoint name.
PARENTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "gate_up_proj"), "mlp"),
}
# Of adapters that were trained on fused linears: the parts share A, and B has their rows in this order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# The norms of a layer, and behind the last layer the model's.
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
FINAL_NORM = "norm"
EMBEDDING, HEAD = "embed_tokens", "lm_head"
NO_LAYER = -1


def module_name(layer: int, module: str) -> str:
    """As the base model names it, and as configs mean it."""
    if layer == NO_LAYER:
        return module if module == HEAD else f"model.{module}"
    parent = "self_attn" if module in ("q_norm", "k_norm") else PARENTS.get(module)
    return f"model.layers.{layer}.{module}" if parent is None else f"model.layers.{layer}.{parent}.{module}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShapes:
    """What an adapter must fit."""

    num_layers: int
    linears: Mapping[str, tuple[int, int]]  # (in, out) features of each linear of a decoder layer, by checkpoint name
    norms: Mapping[str, int] = field(default_factory=dict)  # sizes
    hidden_size: int = 0
    vocab_size: int = 0
    tie_embeddings: bool = False  # the head is the embedding

    def module_names(self) -> list[str]:
        """All that may have LoRA, fused linears included."""
        linears = [linear for linear in PARENTS if self.of(linear) is not None]
        names = [module_name(layer, linear) for layer in range(self.num_layers) for linear in linears]
        return [*names, *(module_name(NO_LAYER, table) for table in (EMBEDDING, HEAD) if self.vocab_size)]

    def norm_places(self) -> list[tuple[int, str]]:
        """(layer, norm) of all that the model has."""
        layers = [(layer, name) for layer in range(self.num_layers) for name in LAYER_NORMS if name in self.norms]
        return [*layers, (NO_LAYER, FINAL_NORM)] if FINAL_NORM in self.norms else layers

    def of(self, linear: str) -> tuple[int, int] | None:
        """Of a linear or of several fused into one; None if the model has none such."""
        parts = [self.linears.get(part) for part in FUSED.get(linear, (linear,))]
        known = [part for part in parts if part is not None]
        return (known[0][0], sum(num_out for _, num_out in known)) if len(known) == len(parts) else None
