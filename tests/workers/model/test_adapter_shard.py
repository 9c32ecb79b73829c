"""A rank's shard of an adapter in host memory, and its size as counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from lorafleet.workers.adapters.format import load_adapter, read_adapter_spec
from lorafleet.workers.model.adapter_shard import cut, shard_bytes
from lorafleet.workers.model.architecture import read_model_spec
from lorafleet.workers.model.shards import linear_shards


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize(("name", "size"), [("smollm2", 2), ("qwen3", 4)])
def test_shards_are_the_ranks_parts_and_as_large_as_was_said(
    name: str, size: int, is_fused: bool, tmp_path: Path
) -> None:
    model = tiny.make_model(name, tmp_path / "model")
    adapted = tiny.make_adapter(model, tmp_path / "adapter", rank=3)
    if is_fused:
        tiny.fuse(adapted, tmp_path / "adapter", "qkv_proj", ["q_proj", "k_proj", "v_proj"])
    spec = read_model_spec(tmp_path / "model")
    adapter = read_adapter_spec(tmp_path / "adapter", spec.base_shapes, max_lora_rank=16)
    whole = load_adapter(adapter, spec.base_shapes, torch.float32)
    for rank in range(size):
        shards = linear_shards(spec, rank, size)
        num_bytes = shard_bytes(adapter, spec.base_shapes, shards, torch.float32)
        part = cut(whole, shards, num_bytes)
        storage = part.storage()
        assert storage is not None and storage.nbytes() == num_bytes < adapter.num_bytes(torch.float32)
        for (layer, linear), change in part.weights.items():
            assert change.a_RI.untyped_storage().data_ptr() == storage.data_ptr(), "one buffer, of its own"
            assert torch.equal(change.a_RI, whole.weights[layer, linear].a_RI[:, shards[linear].inputs])
            assert torch.equal(change.b_RO, whole.weights[layer, linear].b_RO[:, shards[linear].outputs])
