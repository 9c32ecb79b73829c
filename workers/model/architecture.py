"""A checkpoint's architecture, read from its config.json, for the decoder. Supported: the Llama family.

Owns: which architectures are served and what of their configs changes the mathematics. An option that this decoder does
not compute is refused by name. Imports transformers and torch only inside `read_model_spec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorafleet.workers.adapters.modules import BaseShapes
from lorafleet.workers.errors import ModelError, cut
from lorafleet.workers.found_file import FoundFileError, json_object, read_found

_MAX_CONFIG_BYTES = 16 << 20

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes and options of one decoder-only model."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # per layer: keys a query attends to, its own included; 0 means all
    dtype: str  # the checkpoint's
    eos_token_ids: frozenset[int]
    hf_config: Any  # transformers' config, for its RoPE parameters

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size

    @cached_property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(in, out) features of each linear of a layer, by checkpoint name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (hidden, self.q_size),
            "k_proj": (hidden, self.kv_size),
            "v_proj": (hidden, self.kv_size),
            "o_proj": (self.q_size, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def base_shapes(self) -> BaseShapes:
        return BaseShapes(
            num_layers=self.num_layers,
            linears=self.linears,
            norms=self.norms,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            tie_embeddings=self.tie_embeddings,
        )

    @property
    def norms(self) -> Mapping[str, int]:
        """Sizes of each layer's norms and of the model's final norm."""
        sizes = dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), self.hidden_size)
        return sizes | (dict.fromkeys(("q_norm", "k_norm"), self.head_dim) if self.qk_norm else {})

    @property
    def num_norm_elements(self) -> int:
        return sum(size * (1 if name == "norm" else self.num_layers) for name, size in self.norms.items())

    @property
    def num_linear_parameters(self) -> int:
        """Number of weights in the decoder layers' linears, without biases."""
        return self.num_layers * sum(i * o for i, o in self.linears.values())

    @property
    def num_parameters(self) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.num_linear_parameters + embeddings + norms

    def kv_elements_per_token(self, ranks: int) -> int:
        """Return the number of key and value elements per token on one rank."""
        return 2 * self.num_layers * max(1, self.num_kv_heads // ranks) * self.head_dim


def read_model_spec(model_dir: Path) -> ModelSpec:
    """Read config.json and generation_config.json. Raises `ModelError` for anything missing or not supported."""
    config_path = model_dir / "config.json"
    architecture, raw = read_architecture(model_dir)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"{config_path} cannot be read: {error}") from error
    if config.hidden_act != "silu":
        raise ModelError(f"{config_path} has hidden_act {config.hidden_act!r}; only silu is supported.")
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"{config_path} has rope_type {rope_type!r}; supported are {', '.join(ROPE_TYPES)}.")
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"{config_path} has a quantization_config ({cut(str(method or 'of unnamed method'))}); only unquantised "
            "checkpoints are supported. Give the original model; --quantization int8 halves its memory."
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ModelError(f"{config_path} has {heads} heads, not a multiple of its {kv_heads} key-value heads.")
    attention_bias = bool(getattr(config, "attention_bias", False))
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return ModelSpec(
        architecture=architecture,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        max_position=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tie_embeddings=_ties_head(model_dir, bool(config.tie_word_embeddings)),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        o_bias=attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        windows=_windows(config, architecture),
        dtype=dtype,
        eos_token_ids=_eos_token_ids(model_dir, raw),
        hf_config=config,
    )


def read_architecture(model_dir: Path) -> tuple[str, dict[str, Any]]:
    """Return what a model is, and its config.json, at once. Raises `ModelError` for what is no model that is served."""
    config_path = model_dir / "config.json"
    if not config_path.is_file():
        raise ModelError(f"{model_dir} {_not_a_model(model_dir)}")
    raw = _read_json(config_path)
    architectures = raw.get("architectures") or ["(none named)"]
    architecture = architectures[0]
    if architecture not in ARCHITECTURES:
        raise ModelError(f"{config_path} names the architecture {architecture}; served are {', '.join(ARCHITECTURES)}.")
    return architecture, raw


def _ties_head(model_dir: Path, wanted: bool) -> bool:
    """Return whether the head is the embedding: the weights decide, if they are there already."""
    from lorafleet.workers.model.loader import CheckpointReader

    try:
        return wanted and CheckpointReader(model_dir).ties_head(wanted)
    except ModelError:
        return wanted  # loading the weights reports the error


def _not_a_model(directory: Path) -> str:
    """Describe a directory without config.json, and what to do about it."""
    try:
        adapter = json_object(read_found(directory / "adapter_config.json", _MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return "has no config.json: not a Hugging Face model directory."
    base = adapter.get("base_model_name_or_path")
    return (
        f"is an adapter, not a model: it has adapter_config.json and no config.json. Give the base model as MODEL"
        f"{f' ({cut(base)}, according to its config)' if isinstance(base, str) and base else ''}, and the adapter with "
        "--enable-lora --lora-modules NAME=DIRECTORY (LoRARequest offline)."
    )


def _windows(config: Any, architecture: str) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None) or 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    every = window if architecture == "MistralForCausalLM" else 0
    return tuple(every for _ in range(config.num_hidden_layers))


def _eos_token_ids(model_dir: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """Return the tokens that end an answer: the generation config's, else the model config's."""
    generation_path = model_dir / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return frozenset([] if eos is None else eos if isinstance(eos, list) else [eos])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json_object(read_found(path, _MAX_CONFIG_BYTES))
    except FoundFileError as error:
        raise ModelError(f"{path} {error.what}.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} {error}.") from error
