"""Turns a GGUF file, once, into a cached model directory of safetensors and tokenizer.json; loaders know only those.

Tensor by tensor: one is dequantised, put back into transformers' layout and written before the next is read, so that
memory holds one tensor of float32, never the model. Config and tokenizer are read by transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lorafleet.kernels.cache import cache_root
from lorafleet.workers.errors import ModelError

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BIASES = frozenset({"attn_q", "attn_k", "attn_v"})  # of Qwen2; the other architectures' configs have none
# What each rotary frequency is divided by: not a weight, but the only place where GGUF keeps Llama 3's RoPE scaling.
_ROPE_FACTORS = "rope_freqs.weight"
# Those of Llama 3.1 and later; the factor differs and is read off the table.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def cached_gguf(path: Path, progress: Progress | None = None) -> Path:
    """The converted directory of a GGUF file, made at the first call. Raises `ModelError`.

    The cache's key is the file's place, size and time of change. A conversion that is interrupted leaves nothing.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    identity = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    out_dir = cache_root() / "models" / f"{path.stem}-{digest}"
    return out_dir if out_dir.is_dir() else convert_gguf(path, out_dir, progress)


def convert_gguf(path: Path, out_dir: Path, progress: Progress | None = None) -> Path:
    """Write `path` as a Hugging Face directory in bfloat16 to `out_dir`, which appears whole or not at all.

    Raises `ModelError` for an architecture or tensor that is not supported.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:  # the reader trusts what it reads
        raise ModelError(f"{path} cannot be read as GGUF: {error}") from error
    kind = reader.get_field("general.type")
    if kind is not None and kind.contents() == "adapter":
        raise ModelError(
            f"{path} is a GGUF adapter, not a model. GGUF adapters are not supported: give the base model as MODEL, "
            "and the adapter as PEFT saves it with --lora-modules."
        )
    field = reader.get_field("general.architecture")
    architecture = None if field is None else field.contents()
    if architecture not in _ARCHITECTURES:
        raise ModelError(f"{path} has the GGUF architecture {architecture!r}; served are {', '.join(_ARCHITECTURES)}.")
    scaling = reader.get_field(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise ModelError(f"{path} has the RoPE scaling {scaling.contents()!r}, which is not read from GGUF (yet).")
    names = {tensor.name: _name(tensor.name, architecture) for tensor in _weights(reader)}
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work_dir = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        config = _write_config_and_tokenizer(path, work_dir, _ARCHITECTURES[architecture], reader)
        _write_tensors(
            reader,
            names,
            work_dir / "model.safetensors",
            config=config,
            permuted=architecture == "llama",
            progress=progress,
        )
        try:
            work_dir.replace(out_dir)
        except OSError:
            if not out_dir.is_dir():  # else another process was first, and its result is as good
                raise
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    return out_dir


def _write_config_and_tokenizer(path: Path, work_dir: Path, architecture: str, reader: Any) -> Any:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.architectures = [architecture]
    config.dtype = "bfloat16"
    config.tie_word_embeddings = all(tensor.name != "output.weight" for tensor in reader.tensors)
    key_length = reader.get_field(f"{reader.get_field('general.architecture').contents()}.attention.key_length")
    if key_length is not None:
        config.head_dim = int(key_length.contents())
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == _ROPE_FACTORS), None)
    if factors is not None:
        _set_rope_factors(config, np.asarray(factors, dtype=np.float32))
    config.save_pretrained(work_dir)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(work_dir)
    eos = reader.get_field("tokenizer.ggml.eos_token_id")
    bos = reader.get_field("tokenizer.ggml.bos_token_id")
    generation = {
        "bos_token_id": None if bos is None else int(bos.contents()),
        "eos_token_id": None if eos is None else int(eos.contents()),
    }
    (work_dir / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return config


def _set_rope_factors(config: Any, factors: np.ndarray) -> None:
    """Put the RoPE scaling that a table of factors stands for into `config`. Raises `ModelError` for an unknown one."""
    if np.all(factors == 1.0):
        return
    parameters = dict(config.rope_parameters) | _LLAMA3_ROPE | {"rope_type": "llama3", "factor": float(factors.max())}
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelengths = 2 * np.pi * parameters["rope_theta"] ** (np.arange(len(factors)) / len(factors))
    smooth = np.clip((parameters["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0.0, 1.0)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ModelError(f"The GGUF file has a table {_ROPE_FACTORS} that is not Llama 3's; it is not supported.")
    config.rope_parameters = parameters


def _weights(reader: Any) -> list[Any]:
    return [tensor for tensor in reader.tensors if tensor.name != _ROPE_FACTORS]


def _write_tensors(
    reader: Any, names: dict[str, str], out_path: Path, *, config: Any, permuted: bool, progress: Progress | None
) -> None:
    """One safetensors file, header first, then each tensor as it is converted."""
    from gguf import dequantize

    tensors = [(tensor, names[tensor.name]) for tensor in _weights(reader)]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor, name in tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    done = 0
    with out_path.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor, name in tensors:
            try:
                values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            except NotImplementedError as error:
                raise ModelError(f"The GGUF file has {tensor.name} in {tensor.tensor_type.name}: {error}") from error
            values = values.reshape(header[name]["shape"])
            if permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                values = _undo_permutation(values, heads)
            out.write(_bfloat16(values).tobytes())
            done += header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            if progress is not None:
                progress(done, offset)
        out.flush()
        os.fsync(out.fileno())


def _name(gguf_name: str, architecture: str) -> str:
    """The transformers name of a GGUF tensor."""
    if gguf_name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[gguf_name]
    parts = gguf_name.split(".")
    known = len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES
    if known and (parts[3] == "weight" or (parts[3] == "bias" and architecture == "qwen2" and parts[2] in _BIASES)):
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise ModelError(f"The GGUF file has the tensor {gguf_name}, which this decoder does not know.")


def _undo_permutation(weight_OI: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp stores Llama's q and k with each head's rotary pairs interleaved; transformers wants two halves."""
    rows, columns = weight_OI.shape
    return weight_OI.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 → the upper half of its bits, rounded to nearest even, as uint16. NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
