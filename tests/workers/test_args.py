"""The offline engines' keywords are the options of `lorafleet serve`, and reach the engine's configuration."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from lorafleet.workers.args import EngineArgs
from lorafleet.workers.config import EngineConfig, EngineOptions, LoRAConfig
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.options import options_of


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(tmp_path)


def test_every_option_of_engines_and_of_lora_is_a_keyword_under_its_own_name() -> None:
    keywords = {declared.name: declared for declared in options_of(EngineArgs)}
    for owner in (EngineOptions, LoRAConfig):
        for declared in options_of(owner):
            assert keywords[declared.name].says == declared.says
            if declared.name != "max_adapter_wait_s":
                assert keywords[declared.name].default == declared.default


def test_the_defaults_are_those_of_an_engine_but_for_waiting(model: str) -> None:
    assert EngineArgs(model).to_config() == EngineConfig(model, max_adapter_wait_s=0.0, max_waiting=None)
    assert EngineArgs(model, enable_lora=True).to_config().lora == LoRAConfig()


def test_every_keyword_reaches_the_configuration(model: str) -> None:
    engine: dict[str, Any] = {
        "dtype": "bfloat16",
        "quantization": "int8",
        "device": "cpu",
        "max_model_len": 99,
        "num_threads": 2,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 33,
        "max_adapter_wait_s": 9.0,
        "adapter_read_timeout_s": 8.0,
        "block_size": 32,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": 12345,
    }
    lora: dict[str, Any] = {
        "max_loras": 3,
        "max_lora_rank": 5,
        "max_cpu_loras": 6,
        "lora_host_cache_bytes": 1000,
        "lora_dtype": "float32",
        "lora_eviction": "cost",
        "lora_extra_vocab_size": 1,
        "lora_full_weight_bytes": 2000,
    }
    assert {*engine, "model", "tensor_parallel_size"} == {entry.name for entry in fields(EngineOptions)}
    assert lora.keys() == {entry.name for entry in fields(LoRAConfig)}
    made = EngineArgs(model, enable_lora=True, **engine, **lora).to_config()
    assert made == EngineConfig(model, max_waiting=None, lora=LoRAConfig(**lora), **engine)


def test_args_may_be_taken_apart_and_put_together_again(model: str) -> None:
    args = EngineArgs(model, enable_lora=True, max_loras=2, seed=3)
    assert EngineArgs(**asdict(args)) == args
    assert replace(args, max_loras=4).max_loras == 4


def test_none_is_the_default_and_a_path_is_a_model(model: str) -> None:
    assert EngineArgs(Path(model), max_loras=None, lora_dtype=None) == EngineArgs(model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_num_seqs": "8"}, "--max-num-seqs is '8'; it must be a whole number from 1 to 100000."),
        ({"max_loras": 0, "enable_lora": True}, "--max-loras is 0; it must be a whole number from 1 to 100000."),
        ({"enable_lora": "yes"}, "--enable-lora is 'yes'; it must be True or False."),
        ({"seed": 1.5}, "--seed is 1.5; it must be a whole number from -9223372036854775808 to 18446744073709551615."),
        ({"max_lora_rank": 4, "max_loras": 2}, "max_loras, max_lora_rank given without enable_lora=True, where"),
        ({"enable_lora": True, "max_cpu_loras": 1}, "--max-cpu-loras is 1, less than --max-loras 8"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2; the offline engine is one rank"),
    ],
)
def test_what_cannot_be_is_refused_by_name(model: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineArgs(model, **options).to_config()
    assert caught.value.message.startswith(said)
