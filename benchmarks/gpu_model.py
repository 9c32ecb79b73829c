"""A model of random weights on a device, and the steps that are measured on it. No checkpoint, no real prompt.

Owns: the models' shapes, filling weights, pages and slots, plans of steps, and what a step has to read and compute.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from lorafleet.workers.adapters.format import HostAdapter, LinearChange
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.batch import Scheduled, StepPlan, in_row_order
from lorafleet.workers.engine.request import GenerateRequest, Request
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.memory_plan import plan_memory
from lorafleet.workers.model.architecture import ModelSpec, read_spec
from lorafleet.workers.model.device import measure_memory
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.model.runner import ModelRunner

DTYPE = torch.bfloat16
_STD = 0.02  # of weights, A and B
_PIECE_BYTES = 64 << 20
_SAMPLING = SamplingOptions(max_tokens=1 << 20, temperature=1.0, ignore_eos=True)

# Room for the prompt of 8,192 tokens, which is more than Llama 2 was made for; no figure depends on it.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {  # for dry runs
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def spec_of(name: str) -> ModelSpec:
    """Through a config.json, as of any checkpoint."""
    config = LlamaConfig(**SHAPES[name], tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return read_spec(Path(folder))


class RandomWeights(CheckpointReader):
    """In place of a checkpoint: numbers made where they are wanted; a norm's are 1."""

    def __init__(self) -> None:
        """There is no file."""

    def read_into(
        self, out: torch.Tensor, name: str, *, rows: slice = slice(None), columns: slice | None = None
    ) -> None:
        if name.endswith("norm.weight"):
            out.fill_(1.0)
        else:
            out.normal_(0.0, _STD)


class Rerun:
    """Stands in for CUDA's graphs in a dry run: what was recorded runs again."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        return run


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one runner."""

    max_num_seqs: int
    max_num_tokens: int  # of one step
    max_loras: int  # 0: LoRA is off
    max_lora_rank: int
    num_kv_tokens: int | None = None  # None: what fits


@dataclass(frozen=True, slots=True)
class Work:
    """The least that a step has to do: bytes to move once, operations of its products."""

    num_bytes: int
    flop: int


class BenchModel:
    """A runner whose weights and pages are random, with adapters in its slots."""

    def __init__(self, spec: ModelSpec, limits: Limits, device: torch.device) -> None:
        lora = None
        if limits.max_loras:
            lora = LoRAConfig(
                max_loras=limits.max_loras,
                max_lora_rank=limits.max_lora_rank,
                max_cpu_loras=limits.max_loras,
                full_weight_bytes=0,
            )
        page_size, itemsize = 16, DTYPE.itemsize
        self._kv_token_bytes = spec.kv_elements_per_token(1) * itemsize
        kv_bytes = None
        if limits.num_kv_tokens is not None:
            num_pages = -(-max(limits.num_kv_tokens, spec.max_position) // page_size)
            kv_bytes = num_pages * page_size * self._kv_token_bytes
        config = EngineConfig(
            model="",
            dtype="bfloat16",
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_tokens,
            block_size=page_size,
            kv_cache_memory_bytes=kv_bytes,
            lora=lora,
        )
        self.spec = spec
        self.plan = plan_memory(spec, config, measure_memory(device), dtype="bfloat16", lora_dtype="bfloat16")
        self.runner = ModelRunner(spec, self.plan, max_lora_rank=limits.max_lora_rank, device=device)
        self.runner.load_weights(RandomWeights())
        self.runner.warm_up()
        if device.type != "cuda":
            self.runner.capture(Rerun())
        cache = self.runner._cache
        for layer in itertools.chain(cache.keys, cache.values):
            layer.normal_()
        self._device = device
        self._ranks: list[int] = []  # of the adapters in the slots
        self._pages = torch.randperm(self.plan.num_pages).tolist()  # as scattered as after hours of serving
        self._features = spec.num_layers * sum(num_in + num_out for num_in, num_out in spec.linears.values())

    def fill_slots(self, ranks: Sequence[int]) -> None:
        """Write an adapter of each rank into the slot of its number, as the engine does. No step runs."""
        adapters = {rank: self._adapter(rank) for rank in set(ranks)}
        for slot, rank in enumerate(ranks):
            self.runner.clear_slot(slot)
            write = self.runner.prepare_adapter(slot, adapters[rank])
            while not write.advance(_PIECE_BYTES):
                pass
            self.runner.commit(write)
        self._ranks = list(ranks)

    def fits(self, num_seqs: int, num_tokens: int) -> bool:
        """Whether there are pages for so many sequences of so many tokens."""
        return num_seqs * self._pages_for(num_tokens) <= self.plan.num_pages

    def kv_bytes(self, num_seqs: int, num_tokens: int) -> int:
        return num_seqs * num_tokens * self._kv_token_bytes

    def decode_plan(self, num_seqs: int, context: int, num_adapters: int) -> StepPlan:
        """A token for each sequence, which attends to `context` keys, its own included."""
        return self._step(num_seqs, context, 1, num_adapters)

    def prefill_plan(self, num_seqs: int, num_tokens: int, num_adapters: int) -> StepPlan:
        """Whole prompts, of so many tokens each."""
        return self._step(num_seqs, num_tokens, num_tokens, num_adapters)

    def work(self, plan: StepPlan) -> Work:
        """Weights, keys and values, and each adapter at its own rank, once; the products of all tokens."""
        spec, itemsize = self.spec, DTYPE.itemsize
        head = spec.vocab_size * spec.hidden_size
        slots = {slot for entry in plan.scheduled for slot in entry.slots}
        num_weights = spec.num_linear_parameters + head + spec.num_norm_elements
        num_weights += self._features * sum(self._ranks[slot] for slot in slots)
        num_keys = sum(entry.request.num_computed_tokens + entry.num_tokens for entry in plan.scheduled)
        flop = 2 * spec.num_linear_parameters * plan.num_tokens
        for entry in plan.scheduled:
            n = entry.num_tokens
            num_pairs = n * entry.request.num_computed_tokens + n * (n + 1) // 2
            flop += 4 * spec.num_layers * spec.q_size * num_pairs
            flop += 2 * n * self._features * sum(self._ranks[slot] for slot in entry.slots)
            flop += 2 * head * entry.samples
        return Work(num_weights * itemsize + num_keys * self._kv_token_bytes, flop)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.plan.page_size)

    def _step(self, num_seqs: int, num_tokens: int, num_new: int, num_adapters: int) -> StepPlan:
        count = self._pages_for(num_tokens)
        entries = []
        for number in range(num_seqs):
            slot = number % num_adapters if num_adapters else None
            adapter = None if slot is None else f"adapter-{slot}"
            token_ids = tuple((number + place) % self.spec.vocab_size for place in range(num_tokens))
            generate = GenerateRequest(f"{number}", token_ids, _SAMPLING, adapter)
            request = Request.from_generate(generate, arrival=number)
            request.pages = self._pages[number * count : (number + 1) * count]
            request.num_computed_tokens = num_tokens - num_new
            entries.append(Scheduled(request, num_new, () if slot is None else (slot,)))
        return StepPlan(in_row_order(entries), loads=())

    def _adapter(self, rank: int) -> HostAdapter:
        """One that changes every linear. Its memory is in one piece, as of one that was read."""
        num_elements = rank * self._features
        flat = torch.empty(num_elements, dtype=DTYPE, device=self._device).normal_(0.0, _STD).cpu()
        changes, begin = {}, 0
        for layer in range(self.spec.num_layers):
            for name, (num_in, num_out) in self.spec.linears.items():
                middle, end = begin + rank * num_in, begin + rank * (num_in + num_out)
                a_RI, b_RO = flat[begin:middle].view(rank, num_in), flat[middle:end].view(rank, num_out)
                changes[layer, name] = LinearChange(a_RI, b_RO, scaling=2.0)
                begin = end
        return HostAdapter(digest=f"rank-{rank}", weights=changes, num_bytes=num_elements * DTYPE.itemsize)
