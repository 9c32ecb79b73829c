"""Tensor parallelism is only a group size: sharded over real ranks, the model gives the logits of one rank."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from lorafleet.workers.adapters.format import load_adapter, read_spec
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.request import GenerateRequest, Request, SamplingOptions
from lorafleet.workers.engine.scheduler import Scheduled, StepPlan
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.memory_plan import DeviceMemory, plan_memory
from lorafleet.workers.model import architecture
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.tp.group import TensorParallelGroup

PROMPT = tuple(range(5, 42))


def logits(model_dir: Path, adapter_dir: Path, group: TensorParallelGroup) -> torch.Tensor:
    """[2, V]: the base model's and the adapter's logits behind the prompt, computed in one batch."""
    spec = architecture.read_spec(model_dir)
    config = EngineConfig(model=str(model_dir), tensor_parallel_size=group.size, lora=LoRAConfig(max_loras=2))
    memory = DeviceMemory(8 << 30, 8 << 30, 8 << 30, is_cpu=True)
    plan = plan_memory(spec, config, memory, dtype="float32", lora_dtype="float32")
    runner = ModelRunner(spec, plan, max_lora_rank=16, device=torch.device("cpu"), group=group)
    runner.load(model_dir)
    adapter = read_spec(adapter_dir, spec.base_shapes, max_lora_rank=16)
    runner.write_adapter(1, load_adapter(adapter, spec.base_shapes, torch.float32))
    scheduled = []
    for number, slot in enumerate((None, 1)):
        generate = GenerateRequest(str(number), PROMPT, SamplingOptions(max_tokens=1))
        request = Request.from_generate(generate, number)
        request.pages = list(range(number * 4, number * 4 + 4))
        scheduled.append(Scheduled(request, len(PROMPT), slot))
    return runner.logits(StepPlan(tuple(scheduled), ())).clone()


def run_rank(rank: int, size: int, port: int, model_dir: Path, adapter_dir: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    try:
        torch.save(
            logits(model_dir, adapter_dir, TensorParallelGroup(rank, size, dist.group.WORLD)), out / f"{rank}.pt"
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
    expected = logits(tmp_path / "model", tmp_path / "adapter", TensorParallelGroup())
    assert not torch.allclose(expected[0], expected[1], atol=1e-2), "the adapter must make a difference"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (size, port, tmp_path / "model", tmp_path / "adapter", tmp_path)
    multiprocessing.start_processes(_entry, (sys.path, *arguments), nprocs=size, start_method="spawn")
    for rank in range(size):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, atol=1e-4, rtol=0)


def _entry(rank: int, path: list[str], *arguments: object) -> None:
    run_rank(rank, *arguments)  # type: ignore[arg-type]


def test_a_size_that_does_not_divide_the_heads_is_refused_by_name(tmp_path: Path) -> None:
    tiny.make_model("smollm2", tmp_path / "model")
    spec = architecture.read_spec(tmp_path / "model")
    memory = DeviceMemory(8 << 30, 8 << 30, 8 << 30, is_cpu=True)
    config = EngineConfig(model="", tensor_parallel_size=3)
    plan = plan_memory(spec, config, memory, dtype="float32", lora_dtype="float32")
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size is 3.*4 attention heads"):
        ModelRunner(spec, plan, max_lora_rank=0, device=torch.device("cpu"), group=TensorParallelGroup(0, 3))
