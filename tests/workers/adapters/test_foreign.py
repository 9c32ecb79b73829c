"""Input that is not a PEFT adapter in safetensors is named, with advice."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.workers.adapters.foreign import describe, describe_file, describe_head, foreign_config, missing_weights
from lorafleet.workers.found_file import LFS_POINTER


@pytest.mark.parametrize(
    ("files", "reason", "named"),
    [
        (["adapter-q8.gguf"], "gguf", "adapter-q8.gguf"),
        (["adapters.safetensors"], "mlx", "transpose"),
        (
            ["checkpoint-9/adapter_config.json", "checkpoint-10/adapter_config.json"],
            "adapter_in_subfolder",
            "checkpoint-10,",
        ),
        (["config.json", "model.safetensors"], "whole_model", "as MODEL"),
        (["config.json", "model-00001-of-00003.safetensors"], "whole_model", "as MODEL"),
        (["config.json", "pytorch_model.bin"], "whole_model", "as MODEL"),
        (["lora.safetensors", "params.json"], "not_peft", "mistral-finetune"),
        (["pytorch_lora_weights.safetensors"], "not_peft", "image model"),
        (["global_step500/x"], "not_peft", "training run"),
        (["adapter_model.safetensors"], "not_peft", "weights but no adapter_config.json"),
        ([], "not_peft", "not a PEFT adapter"),
    ],
)
def test_a_directory_without_a_config_is_described(files: list[str], reason: str, named: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    what, code = describe(tmp_path, sorted(path.name for path in tmp_path.iterdir()))
    assert code == reason
    assert named in what


@pytest.mark.parametrize(
    ("files", "reason", "named"),
    [
        (["adapter_model-00001-of-00002.safetensors"], "sharded", "shards"),
        (["adapter_model.safetensors.index.json"], "sharded", "shards"),
        (["adapter_model.bin"], "pickle", "adapter_model.bin"),
        (["adapters.safetensors"], "mlx", "MLX"),
        (["x.gguf"], "gguf", "x.gguf"),
        (["checkpoint-5/adapter_model.safetensors"], "adapter_in_subfolder", "checkpoint-5"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.txt"], "missing_weights", "training run"),
        ([], "missing_weights", "adapter_model.safetensors"),
    ],
)
def test_a_directory_without_weights_is_described(files: list[str], reason: str, named: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    what, code = missing_weights(sorted(path.name for path in tmp_path.iterdir()), tmp_path)
    assert code == reason
    assert named in what


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (LFS_POINTER + b"v1", "git_lfs_pointer"),
        (b"GGUF\x03", "gguf"),
        (b"PK\x03\x04", "pickle"),
        (b"\x80\x04", "pickle"),
        (b"\n<!DOCTYPE html>", "bad_safetensors"),
        (b"<html><body>", "bad_safetensors"),
    ],
)
def test_the_beginning_of_a_file_says_what_it_is(head: bytes, reason: str) -> None:
    known = describe_head(head)
    assert known is not None and known[1] == reason


def test_what_is_not_known_is_not_guessed() -> None:
    assert describe_head(b"\x18\0\0\0\0\0\0\0{") is None
    assert foreign_config({"peft_type": "IA3"}) is None
    assert "MLX" in (foreign_config({"fine_tune_type": "lora"}) or "")
    assert "whole model" in (foreign_config({"architectures": ["X"], "model_type": "x"}) or "")


def test_a_file_in_place_of_a_directory_is_named(tmp_path: Path) -> None:
    for name, content, named in (
        ("a.gguf", b"GGUF", "GGUF adapters"),
        ("adapter_model.safetensors", b"", "directory that contains it"),
        ("x", LFS_POINTER, "git lfs pull"),
        ("y", b"", "is a file"),
    ):
        (tmp_path / name).write_bytes(content)
        assert named in describe_file(tmp_path / name, name)
