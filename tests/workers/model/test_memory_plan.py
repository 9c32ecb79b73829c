"""The memory plan as tables: its defaults, and refusals whose advice works."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.errors import MemoryPlanError
from lorafleet.workers.model.architecture import ModelSpec, read_model_spec
from lorafleet.workers.model.memory_plan import DeviceMemory, MemoryPlan, format_bytes, plan_memory
from lorafleet.workers.model.runner import ModelRunner

GIB, MIB = 1 << 30, 1 << 20
# SmolLM2-135M
SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position=8192,
    norm_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(0,) * 30,
    dtype="bfloat16",
    eos_token_ids=frozenset([2]),
    hf_config=None,
)
PAGE_BYTES = 2 * 30 * 3 * 64 * 2 * 16  # keys and values, layers, heads, their size, bfloat16, tokens
ONE_SEQUENCE = PAGE_BYTES * 8192 // 16
BIG = DeviceMemory(64 * GIB, 60 * GIB, 60 * GIB, is_cpu=True)
SMALL = DeviceMemory(2 * GIB, 3 * GIB // 2, 3 * GIB // 2, is_cpu=True)
GPU = DeviceMemory(24 * GIB, 23 * GIB, 60 * GIB, is_cpu=False)


def plan(memory: DeviceMemory = BIG, lora: LoRAConfig | None = None, **config: Any) -> MemoryPlan:
    engine = EngineConfig(model="m", lora=lora, **config)
    made = plan_memory(SPEC, engine, memory, dtype="bfloat16", lora_dtype="bfloat16")
    check(made, memory, engine)
    return made


def check(made: MemoryPlan, memory: DeviceMemory, config: EngineConfig) -> None:
    """Check what holds for every plan: it fits, and so does one sequence of the full length."""
    assert made.budget_bytes <= memory.available_bytes
    used = made.weight_bytes + made.activation_bytes + made.kv_bytes + made.slot_bytes * made.max_loras
    used += made.full_weight_bytes
    assert used + (made.host_cache_bytes if memory.is_cpu else 0) <= made.budget_bytes
    assert made.host_cache_bytes <= memory.host_available_bytes
    assert made.host_cache_bytes >= made.max_loras * made.slot_bytes
    assert made.num_pages * made.page_size >= made.max_model_len
    assert made.kv_bytes == made.num_pages * PAGE_BYTES * config.block_size // 16
    assert config.kv_cache_memory_bytes is None or made.kv_bytes <= config.kv_cache_memory_bytes


def refusal(memory: DeviceMemory = BIG, lora: LoRAConfig | None = None, **config: Any) -> str:
    with pytest.raises(MemoryPlanError) as caught:
        plan(memory, lora, **config)
    return caught.value.message


def advised(message: str, pattern: str) -> int:
    found = re.search(pattern, message)
    assert found is not None, message
    return int(found[1])


def test_a_big_cpu_machine_gets_the_default_bounds() -> None:
    made = plan(BIG, LoRAConfig())
    assert made.budget_bytes == int(64 * GIB * 0.9)
    assert made.weight_bytes == 2 * SPEC.num_parameters
    assert 4 * GIB - PAGE_BYTES < made.kv_bytes <= 4 * GIB
    assert made.host_cache_bytes == GIB
    assert (made.max_loras, made.max_cpu_loras, made.device) == (8, None, "cpu")
    assert (made.max_model_len, made.max_num_batched_tokens) == (8192, 512)


def test_a_small_cpu_machine_gets_an_eighth_for_adapters_and_half_of_the_rest_for_keys_and_values() -> None:
    made = plan(SMALL, LoRAConfig(), max_model_len=2048)
    assert made.budget_bytes == SMALL.available_bytes
    assert made.host_cache_bytes == SMALL.host_available_bytes // 8
    fixed = made.weight_bytes + made.activation_bytes + made.slot_bytes * 8 + made.host_cache_bytes
    fixed += made.full_weight_bytes
    assert made.kv_bytes == (made.budget_bytes - fixed) // 2 // PAGE_BYTES * PAGE_BYTES


def test_a_gpu_gives_keys_and_values_all_that_is_left_up_to_what_can_be_used() -> None:
    made = plan(GPU, LoRAConfig())
    assert made.budget_bytes == int(24 * GIB * 0.9)
    fixed = made.weight_bytes + made.activation_bytes + made.slot_bytes * 8
    useful = 64 * ONE_SEQUENCE
    assert made.kv_bytes == min(useful, (made.budget_bytes - fixed) // PAGE_BYTES * PAGE_BYTES)
    assert (made.device, made.max_num_batched_tokens) == ("cuda", 2048)
    assert plan(GPU, max_num_seqs=2).kv_bytes == 2 * ONE_SEQUENCE


def test_workers_on_one_host_share_its_memory_and_each_has_its_gpu() -> None:
    assert plan(BIG, workers_per_host=3).budget_bytes == int(BIG.total_bytes // 3 * 0.9)
    # A restarted one finds little free, since the others have their shares; all of it is for this one.
    late = replace(BIG, available_bytes=10 * GIB, host_available_bytes=10 * GIB)
    assert plan(late, workers_per_host=3).budget_bytes == 10 * GIB
    assert plan(GPU, workers_per_host=3) == plan(GPU)


def test_without_lora_nothing_is_kept_for_adapters() -> None:
    made = plan()
    assert (made.max_loras, made.slot_bytes, made.host_cache_bytes, made.max_cpu_loras) == (0, 0, 0, None)
    assert "adapter" not in "\n".join(made.lines())


@pytest.mark.parametrize("memory", [BIG, GPU])
@pytest.mark.parametrize("utilization", [0.1, 0.5, 1.0])
def test_utilization_is_a_share_of_all_memory_bounded_by_the_free(memory: DeviceMemory, utilization: float) -> None:
    made = plan(memory, gpu_memory_utilization=utilization)
    assert made.budget_bytes == min(int(memory.total_bytes * utilization), memory.available_bytes)


@pytest.mark.parametrize("memory", [BIG, SMALL, GPU])
def test_an_explicit_kv_cache_is_taken_in_whole_pages(memory: DeviceMemory) -> None:
    made = plan(memory, kv_cache_memory_bytes=100 * PAGE_BYTES + 7, max_model_len=1600)
    assert made.num_pages == 100


@pytest.mark.parametrize("memory", [BIG, SMALL, GPU])
@pytest.mark.parametrize("lora", [None, LoRAConfig()])
def test_a_kv_cache_too_large_is_refused_with_the_largest_that_works(
    memory: DeviceMemory, lora: LoRAConfig | None
) -> None:
    message = refusal(memory, lora, kv_cache_memory_bytes=100 * GIB)
    assert "--kv-cache-memory-bytes is 100 GiB" in message
    most = advised(message, r"at most (\d+) bytes")
    plan(memory, lora, kv_cache_memory_bytes=most)
    refusal(memory, lora, kv_cache_memory_bytes=most + 1)


@pytest.mark.parametrize("memory", [BIG, SMALL, GPU])
@pytest.mark.parametrize("kv_bytes", [1, PAGE_BYTES, 5 * PAGE_BYTES + 1, ONE_SEQUENCE - 1])
def test_a_kv_cache_too_small_is_refused_with_values_that_work(memory: DeviceMemory, kv_bytes: int) -> None:
    message = refusal(memory, kv_cache_memory_bytes=kv_bytes)
    assert "--max-model-len 8192" in message
    least = advised(message, r"raise --kv-cache-memory-bytes to (\d+)")
    plan(memory, kv_cache_memory_bytes=least)
    refusal(memory, kv_cache_memory_bytes=least - 1)
    if kv_bytes < PAGE_BYTES:
        assert "Lower --max-model-len" not in message, "a length of 0 is no advice"
    else:
        longest = advised(message, r"Lower --max-model-len to (\d+)")
        plan(memory, kv_cache_memory_bytes=kv_bytes, max_model_len=longest)
        refusal(memory, kv_cache_memory_bytes=kv_bytes, max_model_len=longest + 1)


@pytest.mark.parametrize("kv_bytes", [None, ONE_SEQUENCE, 100 * GIB])
@pytest.mark.parametrize("is_cpu", [True, False])
def test_a_machine_too_small_for_one_sequence_is_refused_with_a_length_that_works(
    kv_bytes: int | None, is_cpu: bool
) -> None:
    roomy = plan()
    fixed = roomy.weight_bytes + plan(dataclasses.replace(BIG, is_cpu=is_cpu)).activation_bytes
    free = fixed + 10 * PAGE_BYTES + 1
    memory = DeviceMemory(64 * GIB, free, free, is_cpu=is_cpu)
    message = refusal(memory, kv_cache_memory_bytes=kv_bytes)
    assert "raise --kv-cache-memory-bytes" not in message, "there is no room for more"
    longest = advised(message, r"Lower --max-model-len to (\d+)")
    assert longest == 160
    plan(memory, max_model_len=longest)
    message = refusal(dataclasses.replace(memory, available_bytes=fixed + 1), kv_cache_memory_bytes=kv_bytes)
    assert "Lower --max-model-len" not in message, "a length of 0 is no advice"


def test_a_length_beyond_the_models_is_refused_with_the_models() -> None:
    assert plan(max_model_len=100).max_model_len == 100
    message = refusal(max_model_len=8193)
    assert "--max-model-len is 8193" in message
    assert plan(max_model_len=advised(message, r"Give at most (\d+)")).max_model_len == 8192


def test_what_does_not_fit_at_all_is_refused_with_every_part_named() -> None:
    tiny = DeviceMemory(200 * MIB, 200 * MIB, 200 * MIB, is_cpu=True)
    message = refusal(tiny, LoRAConfig())
    for part in ("Weights", "workspace", "8 adapter slots", "host cache", "180 MiB may be used", "0.9", "--max-loras"):
        assert part in message


@pytest.mark.parametrize("memory", [BIG, GPU])
def test_a_bound_on_adapters_sizes_the_host_cache_and_bytes_overrule_it(memory: DeviceMemory) -> None:
    slot_bytes = plan(memory, LoRAConfig()).slot_bytes
    counted = plan(memory, LoRAConfig(max_cpu_loras=20))
    assert (counted.host_cache_bytes, counted.max_cpu_loras) == (20 * slot_bytes, 20)
    assert plan(memory, LoRAConfig(max_cpu_loras=20, lora_host_cache_bytes=GIB)).host_cache_bytes == GIB
    assert plan(memory, LoRAConfig(max_loras=300)).host_cache_bytes == 300 * slot_bytes


def test_a_slot_is_the_largest_adapter_in_the_adapters_dtype_with_a_scale_a_shift_and_norms() -> None:
    engine = EngineConfig(model="m", lora=LoRAConfig(max_lora_rank=5))
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        made = plan_memory(SPEC, engine, BIG, dtype="bfloat16", lora_dtype=dtype)
        sides = (576 + 576) + 2 * (576 + 192) + (576 + 576) + 3 * (576 + 1536)
        outputs = 576 + 2 * 192 + 576 + 2 * 1536 + 576
        norms = (2 * 30 + 1) * 576 * 2
        assert made.slot_bytes == 30 * (5 * sides * size + outputs * 2 * 4) + norms


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weights_take_the_bytes_that_are_planned_for_them(quantization: str | None, tied: bool, tmp_path: Path) -> None:
    # 144: the kernels' groups of 16 outputs leave no rest, which would be padded.
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=144,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )
    model.save_pretrained(tmp_path)
    spec = read_model_spec(tmp_path)
    config = EngineConfig(model=str(tmp_path), quantization=quantization)
    made = plan_memory(spec, config, BIG, dtype="bfloat16", lora_dtype="bfloat16")
    runner = ModelRunner(spec, made, max_lora_rank=0, device=torch.device("cpu"))
    runner.load(tmp_path)
    decoder = runner._decoder
    weights = {id(one): one for one in (decoder._embedding.weight, decoder._head.weight)}  # tied: the same
    tensors = [decoder._norm.weight_WH]
    for layer in decoder._layers:
        tensors += [norm.weight_WH for norm in layer.norms()]
        weights |= {id(one.weight): one.weight for one in (layer.qkv, layer.o, layer.gate_up, layer.down)}
    for weight in weights.values():
        tensors += [weight.data] if weight.scale_O is None else [weight.data, weight.scale_O]
    assert made.weight_bytes == sum(tensor.nbytes for tensor in tensors)
    # The model has no others.
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.num_parameters


def test_int8_takes_a_byte_for_each_integer_and_four_for_each_scale_and_is_named_in_the_printed_plan() -> None:
    made, plain = plan(quantization="int8"), plan()
    layer_outputs = 576 + 2 * 192 + 576 + 2 * 1536 + 576
    layer_integers = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536
    assert plain.weight_bytes - made.weight_bytes == 30 * (layer_integers - 4 * layer_outputs)
    line = made.lines()[1]
    assert re.fullmatch(rf"  weights +{re.escape(format_bytes(made.weight_bytes))}  int8, bfloat16", line)
    assert plain.lines()[1].endswith("  bfloat16")


def test_a_host_cache_that_cannot_back_the_slots_is_refused_with_the_least_that_works() -> None:
    message = refusal(BIG, LoRAConfig(lora_host_cache_bytes=1))
    assert "--lora-host-cache-bytes is 1 B" in message
    least = advised(message, r"at least (\d+) bytes")
    plan(BIG, LoRAConfig(lora_host_cache_bytes=least))
    refusal(BIG, LoRAConfig(lora_host_cache_bytes=least - 1))


def test_a_host_cache_larger_than_the_hosts_memory_is_refused_beside_a_gpu() -> None:
    message = refusal(GPU, LoRAConfig(lora_host_cache_bytes=61 * GIB))
    assert "61 GiB" in message
    assert "60 GiB" in message
    assert "--lora-host-cache-bytes" in message


def test_adapters_own_embeddings_get_four_tables_by_default_and_never_make_a_plan_fail() -> None:
    table = 49152 * 576 * 2
    assert plan(BIG, LoRAConfig()).full_weight_bytes == 4 * table
    small = plan(SMALL, LoRAConfig(), max_model_len=2048)
    assert small.full_weight_bytes == small.budget_bytes // 16
    assert plan(BIG).full_weight_bytes == 0
    assert plan(BIG, LoRAConfig(lora_full_weight_bytes=GIB)).full_weight_bytes == GIB
    assert plan(BIG, LoRAConfig(lora_full_weight_bytes=0)).full_weight_bytes == 0
    full = plan(BIG, LoRAConfig(lora_full_weight_bytes=0)).budget_bytes
    message = refusal(BIG, LoRAConfig(lora_full_weight_bytes=full))
    assert "embeddings and heads of adapters (57.6 GiB)" in message and "--lora-full-weight-bytes" in message
    tight = DeviceMemory(4 * GIB, made_without(BIG) + ONE_SEQUENCE, 60 * GIB, is_cpu=False)
    assert plan(tight, LoRAConfig(), gpu_memory_utilization=1.0).full_weight_bytes == 0


def made_without(memory: DeviceMemory) -> int:
    """Return the fixed memory besides keys and values, on a GPU."""
    made = plan(memory, LoRAConfig(lora_full_weight_bytes=0), max_num_batched_tokens=2048)
    return made.weight_bytes + made.activation_bytes + made.slot_bytes * made.max_loras


def test_the_printed_plan_names_each_part() -> None:
    made = plan(BIG, LoRAConfig(max_cpu_loras=20))
    text = "\n".join(made.lines())
    for part in (
        "cpu",
        "weights",
        "KV cache",
        "workspace",
        "adapter slots",
        "adapter embeddings",
        "host adapter cache",
        "at most 20 adapters",
    ):
        assert part in text
    bounds = (made.slot_bytes * 8, made.full_weight_bytes, made.host_cache_bytes)
    for size in (made.weight_bytes, made.kv_bytes, made.activation_bytes, *bounds):
        assert format_bytes(size) in text
    assert f"{made.num_pages:,} pages of 16 = {made.num_kv_tokens:,} tokens" in text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (3 * MIB // 2, "1.5 MiB"),
        (1000 * MIB, "1000 MiB"),
        (5 * GIB, "5 GiB"),
        (2000 * GIB, "2000 GiB"),
    ],
)
def test_bytes_are_printed_in_the_largest_unit(size: int, text: str) -> None:
    assert format_bytes(size) == text
