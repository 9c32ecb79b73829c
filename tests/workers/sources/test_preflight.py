"""Errors that are found before anything starts, and those that are left to the workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafleet.workers.config import EngineConfig, LoRAConfig, LoRAModule
from lorafleet.workers.errors import AdapterRefusedError, ConfigError, MemoryPlanError, ModelError
from lorafleet.workers.sources import preflight
from lorafleet.workers.sources.preflight import check_files

MODEL = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 1024}
ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model", "config.json", MODEL)


def write(folder: Path, name: str, fields: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(fields))
    return folder


def adapter(folder: Path, **changes: Any) -> LoRAModule:
    write(folder, "adapter_config.json", ADAPTER | changes)
    (folder / "adapter_model.safetensors").touch()
    return LoRAModule("mine", str(folder))


def check(model: Path, *modules: LoRAModule, are_here: bool = True, **options: Any) -> None:
    config = EngineConfig(str(model), lora=LoRAConfig(max_lora_rank=16), **options)
    check_files(config, modules, are_here=are_here)


def test_what_can_be_served_passes(model: Path, tmp_path: Path) -> None:
    check(model, adapter(tmp_path / "adapter", r=16), LoRAModule("hub", "org/name"), max_model_len=1024)


SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "dtype": "float32",
}


@pytest.fixture
def sized(tmp_path: Path) -> Path:
    return write(tmp_path / "sized", "config.json", MODEL | SIZES)


def test_a_cache_that_holds_not_one_sequence_is_refused(sized: Path) -> None:
    check(sized, device="cpu", kv_cache_memory_bytes=1 << 20)
    with pytest.raises(MemoryPlanError, match="--kv-cache-memory-bytes is 1000 B"):
        check(sized, device="cpu", kv_cache_memory_bytes=1000)
    check(sized, device="cpu", kv_cache_memory_bytes=1000, are_here=False)


def test_what_no_memory_of_this_machine_holds_is_refused(sized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "host_memory", lambda: (64 << 20, 1 << 20))
    check(sized, device="cpu", max_num_seqs=4, max_num_batched_tokens=64)  # what is free now says nothing
    with pytest.raises(MemoryPlanError, match="--max-num-batched-tokens"):
        check(sized, device="cpu", max_num_batched_tokens=100_000)


def test_a_device_that_may_be_there_is_left_to_the_worker(
    sized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_MAY_HAVE_CUDA", tmp_path)
    check(sized, kv_cache_memory_bytes=1000)


def test_ranks_that_do_not_divide_the_heads_are_refused(sized: Path) -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel-size is 3, which does not divide"):
        check(sized, tensor_parallel_size=3)


@pytest.mark.parametrize("missing", SIZES.keys() - {"dtype"})
def test_sizes_that_config_json_leaves_out_are_left_to_the_worker(tmp_path: Path, missing: str) -> None:
    fields = {name: value for name, value in (MODEL | SIZES).items() if name != missing}
    check(write(tmp_path / "model", "config.json", fields), device="cpu", kv_cache_memory_bytes=1000)


@pytest.mark.parametrize("changes", [{"head_dim": "64"}, {"hidden_size": 2}, {"vocab_size": True}, {"head_dim": -1}])
def test_sizes_that_cannot_be_are_left_to_the_worker(tmp_path: Path, changes: dict[str, Any]) -> None:
    fields = MODEL | SIZES | changes
    check(write(tmp_path / "model", "config.json", fields), device="cpu", kv_cache_memory_bytes=1000)


def test_a_context_longer_than_the_models_is_refused(model: Path) -> None:
    with pytest.raises(MemoryPlanError, match=r"--max-model-len is 1025; LlamaForCausalLM was made for 1024 positions"):
        check(model, max_model_len=1025)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "names the architecture GPT2LMHeadModel; served are"),
        ({"architectures": []}, "names the architecture"),
        ([], "config.json"),
    ],
)
def test_a_model_that_is_not_served_is_refused(tmp_path: Path, fields: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        check(write(tmp_path / "model", "config.json", fields))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 64}, "has rank 64; the limit is 16. Start with --max-lora-rank 64."),
        ({"r": 0}, "has r=0; it must be a positive integer"),
        ({"peft_type": "IA3"}, "only LORA is served"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_named_with_the_reason(
    model: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdapterRefusedError) as caught:
        check(model, adapter(tmp_path / "adapter", **changes))
    assert caught.value.message.startswith("Adapter 'mine': ") and said in caught.value.message


@pytest.mark.parametrize("changes", [{"rank_pattern": {"q_proj": 4}}, {"target_modules": []}])
def test_a_rank_that_may_be_nobodys_is_left_to_the_tensors(
    model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    check(model, adapter(tmp_path / "adapter", r=64, **changes))


def test_missing_weights_are_told(model: Path, tmp_path: Path) -> None:
    module = adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(AdapterRefusedError, match="a pickle"):
        check(model, module)


def test_a_path_that_is_not_here_is_refused_unless_workers_may_run_elsewhere(model: Path, tmp_path: Path) -> None:
    module = LoRAModule("mine", str(tmp_path / "nothing"))
    check(model, module, are_here=False)
    with pytest.raises(AdapterRefusedError) as caught:
        check(model, module)
    assert caught.value.message.startswith(f"Adapter 'mine': {module.path} does not exist.")


def test_a_fleet_that_cannot_start_says_so_without_ray_or_torch(model: Path, tmp_path: Path) -> None:
    module = adapter(tmp_path / "adapter", r=64)
    flags = ["serve", str(model), "--enable-lora", "--lora-modules", f"mine={module.path}"]
    program = (
        "import sys\nfrom lorafleet.controller.commands.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as ended:\n    print(ended.code)\n"
        "print({'ray', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=60)
    assert "lorafleet: error: Adapter 'mine': " in done.stdout and done.stdout.endswith("set()\n"), done.stdout
