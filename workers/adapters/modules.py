"""The linears that an adapter may change, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Where a decoder layer keeps its linears, by checkpoint name.
PARENTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "gate_up_proj"), "mlp"),
}
# Of adapters that were trained on fused linears: the parts share A, and B has their rows in this order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def module_name(layer: int, linear: str) -> str:
    """As the base model names it, and as patterns in configs mean it."""
    return f"model.layers.{layer}.{PARENTS[linear]}.{linear}"


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """What an adapter must fit: (in features, out features) of each linear of a decoder layer, by checkpoint name."""

    num_layers: int
    linears: Mapping[str, tuple[int, int]]

    def of(self, linear: str) -> tuple[int, int] | None:
        """Of a linear or of several fused into one; None if the model has none such."""
        parts = [self.linears.get(part) for part in FUSED.get(linear, (linear,))]
        known = [part for part in parts if part is not None]
        return (known[0][0], sum(num_out for _, num_out in known)) if len(known) == len(parts) else None
