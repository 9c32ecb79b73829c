"""What a PEFT config may ask for, each against peft in float32, in one batch with the base model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import run_engine

from lorafleet.workers.adapters.weights_file import WEIGHTS_FILE
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest
from lorafleet.workers.engine.sampling_options import SamplingOptions

PROMPT = list(range(7, 40))
GREEDY = SamplingOptions(max_tokens=8, temperature=0.0, logprobs=10, ignore_eos=True)
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 7, "2.self_attn.o_proj": 1},
    "alpha_pattern": {"k_proj": 3, r".*\.0\.self_attn\.[qv]_proj": 20, "down_proj": 1.5},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "rank and alpha patterns": PATTERNS,
    "patterns with rsLoRA": PATTERNS | {"use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*layers\.[02]\..*\.(q|down)_proj"},
    "some layers": {"layers_to_transform": [1]},
    "bias of B": {"lora_bias": True},
    "DoRA": {"use_dora": True},
    "DoRA with rsLoRA and patterns": PATTERNS | {"use_dora": True, "use_rslora": True},
}
# (architecture with biases, options)
BIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all biases": ("qwen2", {"bias": "all"}),
    "biases of linears without LoRA": ("llama-biased", {"bias": "all", "targets": ["q_proj", "down_proj"]}),
    "LoRA's biases alone": ("qwen2", {"bias": "lora_only"}),
    "DoRA on a base with biases": ("llama-biased", {"use_dora": True}),
    "DoRA with biases": ("llama-biased", {"use_dora": True, "bias": "all"}),
    "bias of B on a base with biases": ("llama-biased", {"lora_bias": True}),
}


def assert_served_as_by_peft(directory: Path, adapter: Path, adapted: PeftModel, base: Any) -> None:
    config = EngineConfig(
        model=str(directory), dtype="float32", max_num_seqs=4, max_num_batched_tokens=16, lora=LoRAConfig(max_loras=2)
    )
    engine = Engine.from_config(config)
    try:
        engine.load()
        digest = engine.register_adapter(str(adapter)).digest
        requests = [GenerateRequest(name, tuple(PROMPT), GREEDY, own) for name, own in (("b", None), ("a", digest))]
        results = run_engine(engine, requests)
    finally:
        engine.close()
    tiny.assert_agrees(results["b"], base, PROMPT)
    tiny.assert_agrees(results["a"], adapted, PROMPT)
    difference = [abs(a.logprob - b.logprob) for a, b in zip(results["a"].logprobs, results["b"].logprobs, strict=True)]
    assert max(difference) > 100 * tiny.TOLERANCE, "the adapter must make a difference"


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of biases of B
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_an_adapter_is_applied_as_its_config_says(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.make_model("smollm2", tmp_path / "model")
    adapted = tiny.make_adapter(copy.deepcopy(model), tmp_path / "adapter", **options)
    assert_served_as_by_peft(tmp_path / "model", tmp_path / "adapter", adapted, model)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(("name", "options"), BIASES.values(), ids=BIASES.keys())
def test_an_adapters_biases_are_its_own(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.make_model(name, tmp_path / "model")
    adapted = tiny.make_adapter(copy.deepcopy(model), tmp_path / "adapter", **options)
    assert_served_as_by_peft(tmp_path / "model", tmp_path / "adapter", adapted, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_adapters_file_may_have_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.make_model("smollm2", tmp_path / "model")
    adapted = tiny.make_adapter(copy.deepcopy(model), tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS_FILE
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype).float()
    assert_served_as_by_peft(tmp_path / "model", tmp_path / "adapter", adapted, model)


def test_an_adapter_on_fused_modules_is_applied_to_their_parts(tmp_path: Path) -> None:
    """Key and value heads are fewer than query heads, so the parts differ in size."""
    model = tiny.make_model("smollm2", tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapted = tiny.make_adapter(copy.deepcopy(model), adapter)
    tiny.fuse(adapted, adapter, "qkv_proj", ["q_proj", "k_proj", "v_proj"])
    tiny.fuse(adapted, adapter, "gate_up_proj", ["gate_proj", "up_proj"])
    assert_served_as_by_peft(tmp_path / "model", adapter, adapted, model)
