"""Memory of a rank while it reads its shard: never the whole model."""

from __future__ import annotations

import re
import socket
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from transformers import AutoModelForCausalLM, LlamaConfig

from lorafleet.workers.config import EngineConfig
from lorafleet.workers.model import architecture
from lorafleet.workers.model.memory_plan import DeviceMemory, plan_memory
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.tp.group import TensorParallelGroup

CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


class Peak:
    """The highest memory of this process above its current level: its own, without pages of mapped files."""

    def __enter__(self) -> Peak:
        self._before = self.num_bytes = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.num_bytes = max(self.num_bytes, _anonymous_bytes()) - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.0005):
            self.num_bytes = max(self.num_bytes, _anonymous_bytes())


def _anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def load_peak(model_dir: Path, group: TensorParallelGroup) -> int:
    """Return the peak bytes of the weights and of reading them."""
    spec = architecture.read_model_spec(model_dir)
    config = EngineConfig(model=str(model_dir), tensor_parallel_size=group.size, kv_cache_memory_bytes=2 << 20)
    memory = DeviceMemory(8 << 30, 8 << 30, 8 << 30, is_cpu=True)
    plan = plan_memory(spec, config, memory, dtype="float32", lora_dtype="float32")
    with Peak() as peak:
        runner = ModelRunner(spec, plan, max_lora_rank=0, device=torch.device("cpu"), group=group)
        runner.load(model_dir)
    return peak.num_bytes


def _entry(rank: int, path: list[str], size: int, port: int, model_dir: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    try:
        peak = load_peak(model_dir, TensorParallelGroup(rank, size, dist.group.WORLD if size > 1 else None))
        (out / f"{rank}-of-{size}").write_text(str(peak))
    finally:
        dist.destroy_process_group()


def peaks(size: int, model_dir: Path, out: Path) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (sys.path, size, port, model_dir, out)
    start_processes(_entry, arguments, nprocs=size, start_method="spawn")
    return [int((out / f"{rank}-of-{size}").read_text()) for rank in range(size)]


def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    model = AutoModelForCausalLM.from_config(CONFIG)
    model.save_pretrained(model_dir)
    num_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    del model
    (alone,) = peaks(1, model_dir, tmp_path)
    assert alone > 0.9 * num_bytes, "else this measures nothing"
    for peak in peaks(2, model_dir, tmp_path):
        assert 0.45 * num_bytes < peak < 0.7 * num_bytes
