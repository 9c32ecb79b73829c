"""Every architecture against transformers and peft, run live in float32 on tiny random models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from tiny import run_engine

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.errors import ModelError
from lorafleet.workers.model.architecture import read_spec

PROMPT_LENGTH = 50
NUM_OUTPUT = 12


@pytest.mark.parametrize("name", sorted(tiny.ARCHITECTURES))
def test_an_architecture_agrees_with_transformers_and_peft(name: str, tmp_path: Path) -> None:
    model = tiny.make_model(name, tmp_path / "model")
    adapted = tiny.make_adapter(copy.deepcopy(model), tmp_path / "adapter")
    config = EngineConfig(
        model=str(tmp_path / "model"),
        dtype="float32",
        max_num_seqs=4,
        max_num_batched_tokens=16,  # the prompt is computed in four chunks
        lora=LoRAConfig(max_loras=2),
    )
    torch.manual_seed(5)
    prompt = torch.randint(3, model.config.vocab_size, (1, PROMPT_LENGTH))
    greedy = SamplingOptions(max_tokens=NUM_OUTPUT, temperature=0.0, logprobs=20, ignore_eos=True)
    engine = Engine.from_config(config)
    try:
        engine.load()
        digest = engine.register_adapter(str(tmp_path / "adapter")).digest
        requests = [
            GenerateRequest("base", tuple(prompt[0].tolist()), greedy),
            GenerateRequest("adapter", tuple(prompt[0].tolist()), greedy, digest),
        ]
        results = run_engine(engine, requests)
        engine.check_integrity()
    finally:
        engine.close()
    tiny.assert_agrees(results["base"], model, prompt[0].tolist())
    tiny.assert_agrees(results["adapter"], adapted, prompt[0].tolist())
    assert results["base"].token_ids != results["adapter"].token_ids, "the adapter must make a difference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
    ],
)
def test_a_config_that_is_not_served_is_refused_by_name(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    tiny.save_config("llama2", tmp_path, change)
    with pytest.raises(ModelError, match=message):
        read_spec(tmp_path)


def test_a_checkpoint_without_a_tensor_names_it(tmp_path: Path) -> None:
    tiny.make_model("smollm2", tmp_path)
    tiny.drop_tensor(tmp_path, "model.layers.1.mlp.up_proj.weight")
    engine = Engine.from_config(EngineConfig(model=str(tmp_path)))
    try:
        with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            engine.load()
    finally:
        engine.close()


def test_a_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny.save_config("llama2", tmp_path, {})
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    engine = Engine.from_config(EngineConfig(model=str(tmp_path)))
    try:
        with pytest.raises(ModelError, match="pickle"):
            engine.load()
    finally:
        engine.close()
