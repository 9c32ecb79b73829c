"""GGUF files, written here from tiny models, come out as the models they were made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from lorafleet.workers.config import EngineConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.errors import ModelError
from lorafleet.workers.model.architecture import read_spec
from lorafleet.workers.model.gguf import cached_gguf, convert_gguf

NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# GGUF's architecture by that of tests/tiny.py
ARCHITECTURES = {"llama2": "llama", "smollm2": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
Q8_0 = gguf.GGMLQuantizationType.Q8_0
Change = Callable[[gguf.GGUFWriter], None]


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of transformers' tensors."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES.get(stem) or NAMES[stem.removeprefix('model.')]}.{kind}"


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """As in llama.cpp's convert_hf_to_gguf.py: two halves of a head become pairs."""
    return (
        weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(
    path: Path, model: PreTrainedModel, architecture: str, *, quantized: bool = False, change: Change | None = None
) -> Path:
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    if architecture == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    add_tokenizer(writer, config.vocab_size)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.numpy()
        if architecture == "llama" and "q_proj" in name:
            values = permute(values, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            values = permute(values, config.num_key_value_heads)
        if quantized and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Byte-level BPE: three control tokens, the visible ASCII characters and the space, one merge, and filling."""
    tokens = ["<pad>", "<eos>", "<bos>", *(chr(code) for code in range(33, 127)), "Ġ", "th"]
    tokens += [f"filling{i}" for i in range(vocab_size - len(tokens))]
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([control] * 3 + [normal] * (vocab_size - 3))
    writer.add_token_merges(["t h"])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    return {name: tiny.make_model(name, tmp_path_factory.mktemp("model") / name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def llama_gguf(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", models["llama2"], "llama")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_float32_file_becomes_the_model_it_was_made_from(
    name: str, models: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    model = models[name]
    write_gguf(tmp_path / "m.gguf", model, ARCHITECTURES[name])
    out = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    converted = load_file(out / "model.safetensors")
    expected = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert converted.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(converted[key], value, rtol=0, atol=0, msg=key)
    spec = read_spec(out)
    config: Any = model.config
    assert (spec.architecture, spec.dtype) == (type(model).__name__, "bfloat16")
    assert (spec.num_layers, spec.vocab_size) == (config.num_hidden_layers, config.vocab_size)
    assert (spec.max_position, spec.tie_embeddings) == (config.max_position_embeddings, config.tie_word_embeddings)
    assert spec.head_dim == converted["model.layers.0.self_attn.q_proj.weight"].shape[0] // spec.num_heads
    assert spec.norm_eps == pytest.approx(config.rms_norm_eps)
    assert spec.eos_token_ids == {1}
    assert_same_logits(out, model)


def assert_same_logits(out: Path, model: PreTrainedModel) -> None:
    """transformers and our engine, on the converted directory, say what the original rounded to bfloat16 says."""
    prompt = list(range(3, 43))
    rounded = type(model)(model.config)
    rounded.load_state_dict({key: value.bfloat16().float() for key, value in model.state_dict().items()})
    rounded.eval()
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = rounded(torch.tensor([prompt])).logits
        torch.testing.assert_close(again(torch.tensor([prompt])).logits, expected, atol=1e-5, rtol=1e-5)
    engine = Engine.from_config(EngineConfig(model=str(out), dtype="float32", kv_cache_memory_bytes=1 << 20))
    try:
        engine.load()
        options = SamplingOptions(max_tokens=4, temperature=0.0, ignore_eos=True)
        result = tiny.run_engine(engine, [GenerateRequest("r", tuple(prompt), options)])["r"]
    finally:
        engine.close()
    assert result.token_ids == tiny.greedy(rounded, prompt, 4)


def test_a_quantized_file_is_dequantized_to_within_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Q8_0 has blocks of 32 columns, which the tiny sizes do not divide into.
    sizes = tiny.ARCHITECTURES["llama2"].to_dict() | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    config = LlamaConfig(**sizes)
    monkeypatch.setitem(tiny.ARCHITECTURES, "llama-blocks", config)
    model = tiny.make_model("llama-blocks", tmp_path / "blocks")
    write_gguf(tmp_path / "q.gguf", model, "llama", quantized=True)
    converted = load_file(convert_gguf(tmp_path / "q.gguf", tmp_path / "out") / "model.safetensors")
    for key, value in model.state_dict().items():
        # A step of a block is its largest value / 127; half of it, its rounded scale, and bfloat16's rounding.
        bound = value.abs().max() * (0.5 / 127 + 2**-9 + 2**-11)
        assert (converted[key].float() - value).abs().max() <= bound, key
    assert converted.keys() == model.state_dict().keys()


def test_the_tokenizer_and_chat_template_come_along(llama_gguf: Path, tmp_path: Path) -> None:
    out = convert_gguf(llama_gguf, tmp_path / "out")
    assert (out / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("the", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["th", "e"]
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<eos>", "<bos>")
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE


def test_progress_grows_to_the_size_of_the_weights(llama_gguf: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    out = convert_gguf(llama_gguf, tmp_path / "out", lambda done, total: steps.append((done, total)))
    size = sum(2 * tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    assert [total for _, total in steps] == [size] * len(steps)
    assert sorted(set(steps)) == steps
    assert steps[-1][0] == size


def llama3_factors(factor: float, head_dim: int, theta: float, original: int = 8192) -> np.ndarray:
    """As llama.cpp's converter writes them."""
    out = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / 4.0:
            out.append(1.0)
        elif wavelength > original / 1.0:
            out.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_table_of_rope_factors_becomes_its_rope_parameters(
    factor: float, models: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        # 12 dimensions a head: theta is large enough here for all three ranges.
        writer.add_rope_freq_base(500000.0)
        writer.add_tensor("rope_freqs.weight", llama3_factors(factor, 12, 500000.0))

    write_gguf(tmp_path / "m.gguf", models["llama2"], "llama", change=change)
    parameters = read_spec(convert_gguf(tmp_path / "m.gguf", tmp_path / "out")).hf_config.rope_parameters
    assert parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_a_table_of_ones_is_no_rope_scaling(models: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(6, dtype=np.float32))

    write_gguf(tmp_path / "m.gguf", models["llama2"], "llama", change=change)
    out = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert read_spec(out).hf_config.rope_parameters["rope_type"] == "default"
    assert "rope_freqs.weight" not in load_file(out / "model.safetensors")


def tensor(name: str, *shape: int) -> Change:
    return lambda writer: writer.add_tensor(name, np.full(shape, 3.0, dtype=np.float32))


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("gemma2", None, "gemma2.*llama, qwen2, qwen3"),
        ("llama", tensor("blk.0.ffn_gate_exps.weight", 2, 2), "blk.0.ffn_gate_exps.weight"),
        ("llama", tensor("position_embd.weight", 2, 2), "position_embd.weight"),
        ("llama", tensor("blk.0.attn_q.bias", 48), "blk.0.attn_q.bias"),
        ("qwen2", tensor("blk.0.attn_output.bias", 48), "blk.0.attn_output.bias"),
        ("llama", tensor("rope_freqs.weight", 6), "rope_freqs.weight"),
        ("llama", lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "RoPE scaling 'yarn'"),
    ],
)
def test_what_is_not_served_is_refused_and_leaves_nothing(
    architecture: str, change: Change | None, message: str, models: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    model = models["qwen2" if architecture == "qwen2" else "llama2"]
    write_gguf(tmp_path / "m.gguf", model, architecture, change=change)
    with pytest.raises(ModelError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "cache" / "out")
    assert list((tmp_path / "cache").glob("*")) == []


@pytest.mark.parametrize("keep", [0, 3, 100, 3000, -1000])
def test_a_broken_file_is_refused_and_leaves_nothing(keep: int, llama_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(llama_gguf.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        convert_gguf(tmp_path / "broken.gguf", tmp_path / "cache" / "out")
    assert list((tmp_path / "cache").glob("*")) == []


def test_a_converted_file_is_reused_until_it_changes(
    llama_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(llama_gguf.read_bytes())
    steps: list[int] = []
    first = cached_gguf(file, lambda done, total: steps.append(done))
    assert first.is_relative_to(tmp_path / "cache")
    num_steps = len(steps)
    assert cached_gguf(file, lambda done, total: steps.append(done)) == first
    assert len(steps) == num_steps > 0
    with file.open("ab") as opened:
        opened.write(bytes(32))
    assert cached_gguf(file) != first


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.gguf cannot be read"):
        cached_gguf(tmp_path / "absent.gguf")


def test_an_interrupted_conversion_leaves_no_directory(
    llama_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path))

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_gguf(llama_gguf, interrupt)
    assert list((tmp_path / "models").iterdir()) == []
    assert cached_gguf(llama_gguf).is_dir()
