"""Tensor parallelism is only a group size: sharded over real ranks, the model gives the logits of one rank."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from transformers import AutoModelForCausalLM

from lorafleet.workers.adapters.format import load_adapter, read_spec
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.batch import Scheduled, StepPlan
from lorafleet.workers.engine.request import GenerateRequest, Request
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.memory_plan import DeviceMemory, plan_memory
from lorafleet.workers.model import architecture
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.tp.group import TensorParallelGroup

PROMPT = tuple(range(5, 42))


def logits(model_dir: Path, adapter_dirs: list[Path], group: TensorParallelGroup) -> torch.Tensor:
    """[1 + adapters, V]: the base model's and the adapters' logits behind the prompt, computed in one batch."""
    spec = architecture.read_spec(model_dir)
    lora = LoRAConfig(max_loras=1 + len(adapter_dirs))
    config = EngineConfig(model=str(model_dir), tensor_parallel_size=group.size, lora=lora)
    memory = DeviceMemory(8 << 30, 8 << 30, 8 << 30, is_cpu=True)
    plan = plan_memory(spec, config, memory, dtype="float32", lora_dtype="float32")
    runner = ModelRunner(spec, plan, max_lora_rank=16, device=torch.device("cpu"), group=group)
    runner.load(model_dir)
    added: list[tuple[int, ...]] = [()]
    for number, adapter_dir in enumerate(adapter_dirs):
        adapter = read_spec(adapter_dir, spec.base_shapes, max_lora_rank=16, max_extra_vocab=256)
        write = runner.prepare_adapter(1 + number, load_adapter(adapter, spec.base_shapes, torch.float32))
        while not write.advance(max_bytes=1000):
            pass
        write.commit()
        added.append(tuple(range(spec.vocab_size, adapter.vocab_size)))
        planned = plan.full_weight_bytes_of(spec, adapter.vocabulary)
        assert 1 + number not in runner._decoder.tables or (
            runner._decoder.tables[1 + number].num_bytes() <= planned + 64
        )
    scheduled = []
    for number, ids in enumerate(added):
        adapter = str(number) if number else None
        generate = GenerateRequest(str(number), (*ids, *PROMPT), SamplingOptions(max_tokens=1), adapter)
        request = Request.from_generate(generate, number)
        request.pages = list(range(number * 4, number * 4 + 4))
        scheduled.append(Scheduled(request, request.num_tokens, (number,) if number else ()))
    return runner.logits(StepPlan(tuple(scheduled), ())).clone()


def run_rank(rank: int, size: int, port: int, model_dir: Path, adapter_dirs: list[Path], out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    try:
        torch.save(
            logits(model_dir, adapter_dirs, TensorParallelGroup(rank, size, dist.group.WORLD)), out / f"{rank}.pt"
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "size"), [("llama2", 2), ("smollm2", 4), ("qwen2", 2), ("qwen3", 4), ("llama-biased", 2)]
)
def test_sharded_ranks_give_the_logits_of_one(name: str, size: int, tmp_path: Path) -> None:
    """Four ranks over two key-value heads replicate those. The adapter has fused modules and modules of other ranks."""
    model = tiny.make_model(name, tmp_path / "model")
    adapted = tiny.make_adapter(
        model, tmp_path / "adapter", rank_pattern={"1.mlp.down_proj": 2, "o_proj": 7}, alpha_pattern={"o_proj": 3}
    )
    tiny.fuse(adapted, tmp_path / "adapter", "qkv_proj", ["q_proj", "k_proj", "v_proj"])
    tiny.fuse(adapted, tmp_path / "adapter", "gate_up_proj", ["gate_proj", "up_proj"])
    assert_ranks_agree(size, tmp_path / "model", [tmp_path / "adapter"], tmp_path)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(("name", "size"), [("llama2", 2), ("smollm2", 2), ("qwen3", 4)])
def test_sharded_ranks_give_the_logits_of_one_for_adapters_with_tables_and_norms(
    name: str, size: int, tmp_path: Path
) -> None:
    """The vocabulary of 131 leaves the last rank a shorter range; added ids are on all."""
    tables = ["embed_tokens", "lm_head"]
    adapters: list[dict[str, Any]] = [
        {"targets": ["q_proj", *tables]},
        {"targets": ["q_proj", *tables], "save_embedding_layers": False},
        {"targets": ["q_proj", "lm_head"], "use_dora": True},
        {"modules_to_save": [*tables, "norm"]},
        {"trainable_token_indices": {"embed_tokens": [7, 130, 41], "lm_head": [0, 65, 66, 130]}},
        {"added": 3, "modules_to_save": tables},
        {"added": 2, "targets": ["q_proj", *tables]},
    ]
    tiny.make_model(name, tmp_path / "model")
    for number, options in enumerate(adapters):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        model.resize_token_embeddings(131 + options.pop("added", 0), mean_resizing=False)
        fields = {"targets": ["q_proj"]} | options
        tiny.make_adapter(model, tmp_path / str(number), seed=number, strength=0.3, **fields)
    assert_ranks_agree(size, tmp_path / "model", [tmp_path / str(n) for n in range(len(adapters))], tmp_path)


def assert_ranks_agree(size: int, model_dir: Path, adapter_dirs: list[Path], out: Path) -> None:
    expected = logits(model_dir, adapter_dirs, TensorParallelGroup())
    for row in expected[1:]:
        assert not torch.allclose(expected[0], row, atol=1e-2), "the adapter must make a difference"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (size, port, model_dir, adapter_dirs, out)
    multiprocessing.start_processes(_entry, (sys.path, *arguments), nprocs=size, start_method="spawn")
    for rank in range(size):
        torch.testing.assert_close(torch.load(out / f"{rank}.pt"), expected, atol=1e-4, rtol=0)


def _entry(rank: int, path: list[str], *arguments: object) -> None:
    run_rank(rank, *arguments)  # type: ignore[arg-type]


def test_a_size_that_does_not_divide_the_heads_is_refused_by_name(tmp_path: Path) -> None:
    tiny.make_model("smollm2", tmp_path / "model")
    spec = architecture.read_spec(tmp_path / "model")
    memory = DeviceMemory(8 << 30, 8 << 30, 8 << 30, is_cpu=True)
    config = EngineConfig(model="", tensor_parallel_size=3)
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size is 3.*4 attention heads"):
        plan_memory(spec, config, memory, dtype="float32", lora_dtype="float32")
