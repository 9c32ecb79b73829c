"""An engine over several ranks in processes: the tokens of one rank, adapters loaded and unloaded, and its end."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Result, run_engine
from transformers import AutoModelForCausalLM

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.ranks.start import Leader, follow
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

TOKEN = "a token"
PROMPTS = [list(range(3, 20)), [7], list(range(40, 100)), [5, 9, 11]]
GREEDY = SamplingOptions(max_tokens=8, temperature=0.0, ignore_eos=True)


def run_follower(path: list[str], config: EngineConfig, rank: int, leader: str) -> None:
    sys.path[:] = path
    asyncio.run(follow(config, rank, leader, "127.0.0.1", TOKEN))
    os._exit(0)  # as `FollowerActor` does: torch's threads may end badly with the interpreter


@contextmanager
def ranks_of(config: EngineConfig) -> Iterator[tuple[Engine, list[multiprocessing.process.BaseProcess]]]:
    """An engine with its weights loaded, and the processes of its other ranks, which end with it."""
    size = config.tensor_parallel_size
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    lost: list[str] = []
    leader = Leader(config, listener, TOKEN, on_lost=lambda: lost.append("a rank"))
    context = multiprocessing.get_context("spawn")
    followers: list[multiprocessing.process.BaseProcess] = [
        context.Process(target=run_follower, args=(sys.path, config, rank, address)) for rank in range(1, size)
    ]
    for follower in followers:
        follower.start()
    try:
        engine = Engine.from_config(config, leader.gather)
        engine.load()
        engine.bind_thread()
        yield engine, followers
        engine.close()
        for follower in followers:
            follower.join(timeout=30)
            assert follower.exitcode == 0
        assert not lost
    finally:
        for follower in followers:
            follower.kill()


def tokens(engine: Engine, adapters: dict[str, str]) -> dict[str, list[int]]:
    requests = [
        GenerateRequest(f"{name}:{number}", tuple(prompt), GREEDY, digest)
        for number, prompt in enumerate(PROMPTS)
        for name, digest in {"base": None, **adapters}.items()
    ]
    results: dict[str, Result] = run_engine(engine, requests, timeout_s=240.0)
    assert all(result.error is None for result in results.values())
    return {request_id: result.token_ids for request_id, result in results.items()}


def prompt_logprobs(engine: Engine, adapters: dict[str, str]) -> dict[str, list[float]]:
    """Return those of the longest prompt, which is computed in several steps, for one adapter after the other."""
    options = SamplingOptions(max_tokens=0, prompt_logprobs=1)
    found = {}
    for name, digest in {"base": None, **adapters}.items():
        request = GenerateRequest(name, tuple(PROMPTS[2]), options, digest)
        result = run_engine(engine, [request], timeout_s=240.0)[name]
        found[name] = [entry.logprob for entry in result.prompt_logprobs]
        assert len(found[name]) == len(PROMPTS[2]) - 1
    return found


# PEFT options that are split differently: by outputs, inputs, the vocabulary, or not at all.
FORMATS: dict[str, dict[str, Any]] = {
    "linears": {"rank_pattern": {"1.mlp.down_proj": 2, "o_proj": 7}, "strength": 0.3},
    "fused": {"strength": 0.3},
    "dora": {"use_dora": True, "strength": 0.3},
    "bias": {"lora_bias": True, "strength": 0.3},
    "tables": {"targets": ["q_proj", "embed_tokens", "lm_head"], "strength": 0.3},
    "dora on the embedding": {"targets": ["down_proj", "embed_tokens"], "use_dora": True, "strength": 0.3},
    "whole": {"targets": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [7, 130, 41]}, "strength": 0.3},
    "added tokens": {"added": 3, "modules_to_save": ["embed_tokens", "lm_head"], "targets": ["q_proj"]},
}


def make_adapters(name: str, root: Path) -> None:
    tiny.make_model(name, root / "model")
    for seed, (kind, options) in enumerate(FORMATS.items()):
        model = AutoModelForCausalLM.from_pretrained(root / "model")
        fields = dict(options)
        model.resize_token_embeddings(131 + fields.pop("added", 0), mean_resizing=False)
        adapted = tiny.make_adapter(model, root / kind, rank=2 + seed % 3, seed=seed, **fields)
        if kind == "fused":
            tiny.fuse(adapted, root / kind, "qkv_proj", ["q_proj", "k_proj", "v_proj"])
            tiny.fuse(adapted, root / kind, "gate_up_proj", ["gate_proj", "up_proj"])


def register(engine: Engine, root: Path) -> dict[str, str]:
    return {kind: engine.register_adapter(str(root / kind)).digest for kind in FORMATS}


def config_of(root: Path, size: int = 1) -> EngineConfig:
    lora = LoRAConfig(max_loras=3, lora_full_weight_bytes=1 << 24)
    return EngineConfig(
        model=str(root / "model"),
        dtype="float32",
        lora=lora,
        max_num_seqs=4,
        num_threads=1,
        max_num_batched_tokens=48,
        tensor_parallel_size=size,
    )


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    ("name", "size"), [("smollm2", 2), ("qwen3", 4), ("llama2", 2), ("qwen2", 2), ("mistral-sliding", 4)]
)
def test_ranks_give_the_tokens_of_one_while_adapters_take_turns(name: str, size: int, tmp_path: Path) -> None:
    """Four ranks over two key-value heads replicate the heads."""
    make_adapters(name, tmp_path)
    alone = Engine.from_config(config_of(tmp_path))
    alone.load()
    expected = tokens(alone, register(alone, tmp_path))
    scored = prompt_logprobs(alone, register(alone, tmp_path))
    alone.close()
    by_adapter = {tuple(expected[f"{kind}:0"]) for kind in ("base", *FORMATS)}
    assert len(by_adapter) > len(FORMATS) / 2, "the adapters make a difference"
    with ranks_of(config_of(tmp_path, size)) as (engine, _):
        adapters = register(engine, tmp_path)
        assert tokens(engine, adapters) == expected
        for kind, logprobs in prompt_logprobs(engine, adapters).items():
            assert logprobs == pytest.approx(scored[kind], abs=tiny.TOLERANCE), kind
        freed = engine.unregister_adapter(adapters["dora"])
        engine.step()
        assert freed.result(timeout=0).host > 0
        again = engine.register_adapter(str(tmp_path / "dora")).digest
        assert tokens(engine, {"dora": again}).items() <= expected.items()
        engine.check_integrity()
