"""Values that an engine's configuration derives from its host."""

from __future__ import annotations

import os

import pytest

from lorafleet.workers import cores
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.errors import MemoryPlanError


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        ({}, 12),
        ({"tensor_parallel_size": 2}, 6),
        ({"workers_per_host": 3}, 4),
        ({"tensor_parallel_size": 2, "workers_per_host": 3}, 2),
        ({"workers_per_host": 24}, 1),
        ({"workers_per_host": 3, "num_threads": 7}, 7),
    ],
)
def test_all_ranks_of_a_host_share_its_cores(
    options: dict[str, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert EngineConfig("model", **options).threads == threads  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "checkpoint", "on_cpu", "dtype"),
    [
        ({}, "float32", True, "float32"),
        ({}, "float16", True, "bfloat16"),
        ({}, "float16", False, "float16"),
        ({}, "float8_e4m3fn", False, "bfloat16"),
        ({}, "auto", True, "bfloat16"),
        ({"dtype": "float32"}, "bfloat16", True, "float32"),
        ({"quantization": "int8"}, "float32", True, "bfloat16"),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_it_cannot_be(
    options: dict[str, str], checkpoint: str, on_cpu: bool, dtype: str
) -> None:
    assert EngineConfig("model", **options).compute_dtype(checkpoint, on_cpu=on_cpu) == dtype  # type: ignore[arg-type]


def test_adapters_have_the_models_dtype_unless_another_is_given() -> None:
    assert EngineConfig("model").adapter_dtype("bfloat16") == "bfloat16"
    assert EngineConfig("model", lora=LoRAConfig()).adapter_dtype("bfloat16") == "bfloat16"
    assert EngineConfig("model", lora=LoRAConfig(lora_dtype="float32")).adapter_dtype("bfloat16") == "float32"


def test_a_context_is_checked_against_the_models_positions() -> None:
    EngineConfig("model").check_context(16, "LlamaForCausalLM")
    EngineConfig("model", max_model_len=16).check_context(16, "LlamaForCausalLM")
    with pytest.raises(MemoryPlanError, match="--max-model-len is 17; LlamaForCausalLM was made for 16 positions"):
        EngineConfig("model", max_model_len=17).check_context(16, "LlamaForCausalLM")
