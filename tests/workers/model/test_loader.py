"""Where embedding and head of a checkpoint are one, and what a checkpoint is refused for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import run_engine
from transformers import AutoModelForCausalLM

from lorafleet.workers.config import EngineConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.errors import ModelError
from lorafleet.workers.model.architecture import read_spec
from lorafleet.workers.model.gguf import convert_gguf
from lorafleet.workers.model.loader import EMBEDDING_WEIGHT, HEAD_WEIGHT, CheckpointReader

Tensors = dict[str, torch.Tensor]
PROMPT = [5, 17, 40, 88, 120, 9]


def rewrite(directory: Path, change: Callable[[Tensors], None], *, shards: bool = False) -> None:
    """Change a saved model's tensors; `shards`: embedding and head lie in different files."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    if not shards:
        save_file(tensors, path, metadata={"format": "pt"})
        return
    path.unlink()
    head = {name: tensors.pop(name) for name in [HEAD_WEIGHT] if name in tensors}
    weight_map = {}
    for number, part in enumerate((tensors, head)):
        save_file(part, directory / f"model-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def own_head(tensors: Tensors) -> None:
    tensors[HEAD_WEIGHT] = 0.3 * torch.randn(
        tensors[EMBEDDING_WEIGHT].shape, generator=torch.Generator().manual_seed(9)
    )


def last_row_differs(tensors: Tensors) -> None:
    tensors[HEAD_WEIGHT] = tensors[EMBEDDING_WEIGHT].clone()
    tensors[HEAD_WEIGHT][-1] += 1


def same_head(tensors: Tensors) -> None:
    tensors[HEAD_WEIGHT] = tensors[EMBEDDING_WEIGHT].clone()


def head_alone(tensors: Tensors) -> None:
    tensors[HEAD_WEIGHT] = tensors.pop(EMBEDDING_WEIGHT)


@pytest.mark.parametrize("name", ["smollm2", "qwen2"])
@pytest.mark.parametrize(
    ("change", "tied", "shards"),
    [
        (own_head, False, False),
        (own_head, False, True),
        (last_row_differs, False, False),
        (same_head, True, False),
        (head_alone, True, False),
    ],
)
def test_a_config_that_ties_the_head_gives_way_to_a_file_with_another_one_as_in_transformers(
    name: str, change: Callable[[Tensors], None], tied: bool, shards: bool, tmp_path: Path
) -> None:
    tiny.make_model(name, tmp_path)
    rewrite(tmp_path, change, shards=shards)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    assert read_spec(tmp_path).tie_embeddings is tied
    engine = Engine.from_config(EngineConfig(model=str(tmp_path), dtype="float32"))
    try:
        engine.load()
        greedy = SamplingOptions(max_tokens=8, temperature=0.0, logprobs=5, ignore_eos=True)
        results = run_engine(engine, [GenerateRequest("r", tuple(PROMPT), greedy)])
    finally:
        engine.close()
    tiny.assert_agrees(results["r"], reference, PROMPT)


def test_a_config_that_does_not_tie_is_followed(tmp_path: Path) -> None:
    tiny.make_model("llama2", tmp_path)
    rewrite(tmp_path, same_head)
    assert read_spec(tmp_path).tie_embeddings is False


def test_a_config_alone_says_itself_whether_it_ties(tmp_path: Path) -> None:
    tiny.save_config("smollm2", tmp_path, {})
    assert read_spec(tmp_path).tie_embeddings is True


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../../etc/x"}}, "files beside it"),
        ({"weight_map": {"a": 3}}, "files beside it"),
        ({"weight_map": []}, "files beside it"),
        ({}, "weight_map"),
        ([], "list"),
    ],
)
def test_an_index_that_names_no_files_beside_it_is_refused(index: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        CheckpointReader(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(ModelError, match="Git LFS pointer"):
        CheckpointReader(tmp_path)


def test_an_adapter_given_as_the_model_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelError, match=r"is an adapter, not a model.*\(org/base, says its config\).*--lora-modules"):
        read_spec(tmp_path)


def test_a_gguf_adapter_given_as_the_model_is_said_to_be_one(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_string("general.type", "adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="is a GGUF adapter, not a model"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
