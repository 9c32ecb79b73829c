"""Requests as lm-evaluation-harness's `local-completions` sends them, over a real engine: the log-likelihoods of
transformers and peft, as its `hf` model computes them.

For a context and a continuation it sends their tokens with `echo`, and reads the continuation's part of the columns.
With `max_tokens` 1 the last position is of the sampled token and is dropped.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from lorafleet.proto import controller_pb2, worker_pb2, worker_pb2_grpc
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.rpc import create_server
from lorafleet.workers.server.adapter_registry import AdapterRegistry
from lorafleet.workers.server.service import WorkerService

TOKEN = "fleet-token"
MODELS = ("base", "linears", "head")
ADAPTERS: dict[str, dict[str, Any]] = {
    "linears": {},
    "head": {"targets": ["v_proj", "lm_head"], "save_embedding_layers": False},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lm_eval")
    tiny.make_model("llama3", root / "base")
    tiny.save_tokenizer(root / "base")
    return root


@pytest.fixture(scope="module")
def references(root: Path) -> dict[str, Any]:
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).eval()
    models = {"base": base}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        models[name] = tiny.make_adapter(copy.deepcopy(base), root / name, seed=seed + 3, strength=0.2, **options)
    return models


@pytest.fixture
async def fleet(root: Path, references: dict[str, Any], new_fleet: Callable[..., Any]) -> AsyncIterator[Any]:
    """A gateway whose only worker has a real engine, with prompts computed in several steps."""
    config = EngineConfig(
        model=str(root / "base"),
        dtype="float32",
        lora=LoRAConfig(max_loras=2, lora_full_weight_bytes=1 << 20),
        max_num_seqs=4,
        max_num_batched_tokens=24,
    )
    engine = await asyncio.to_thread(Engine.from_config, config)
    await asyncio.to_thread(engine.load)
    digests = {name: engine.register_adapter(str(root / name)).digest for name in ADAPTERS}
    service = WorkerService(engine, AdapterRegistry(engine), worker_id="real", generation=1, on_crash=lambda: None)
    server = create_server(TOKEN)
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    service.start()
    fleet = await new_fleet(num_workers=0, wait=False)
    files = ("tokenizer.json", "tokenizer_config.json")
    fleet.controller.files["real"] = {name: (root / "base" / name).read_bytes() for name in files}
    fleet.controller.table.CopyFrom(
        controller_pb2.RoutingTable(
            incarnation="real",
            version=1,
            base=controller_pb2.BaseModel(names=["base"], tokenizer_digest="real", max_model_len=256, vocab_size=131),
            workers=[
                controller_pb2.WorkerEndpoint(
                    worker_id="real",
                    generation=1,
                    address=f"127.0.0.1:{port}",
                    state=worker_pb2.WORKER_READY,
                    max_num_seqs=4,
                    max_loras=2,
                )
            ],
            adapters=[
                {"name": name, "digest": digest, "version": 1, "parent": "base"} for name, digest in digests.items()
            ],
        )
    )
    fleet.controller.publish()
    await fleet.ready()
    yield fleet
    await fleet.listener.close()
    await server.stop(None)
    await service.stop()
    await asyncio.to_thread(engine.close)


def of_choice(choice: dict[str, Any], num_context: int, end: int | None) -> tuple[float, bool]:
    """Return the log-likelihood of the continuation, and whether each of its tokens is the best."""
    values = choice["logprobs"]["token_logprobs"][num_context:end]
    tops = choice["logprobs"]["top_logprobs"][num_context:end]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


def of_reference(model: Any, token_ids: Sequence[int], num_context: int) -> tuple[float, bool]:
    with torch.no_grad():
        rows = model(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)[num_context - 1 : -1]
    continuation = torch.tensor(token_ids[num_context:])
    is_greedy = bool((rows.argmax(dim=-1) == continuation).all())
    return float(rows.gather(1, continuation[:, None]).sum()), is_greedy


def pairs(reference: Any) -> list[tuple[list[int], int]]:
    """Return sequences and how many of their tokens are the context; every second one is continued greedily."""
    drawn = torch.Generator().manual_seed(5)
    sequences = []
    for number, length in enumerate((3, 17, 40, 90, 1, 60)):
        context = torch.randint(3, 131, (length,), generator=drawn).tolist()
        continuation = torch.randint(3, 131, (5,), generator=drawn).tolist()
        if number % 2:
            continuation = tiny.greedy(reference, context, 5)
        sequences.append((context + continuation, length))
    return sequences


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("model", MODELS)
async def test_log_likelihoods_are_those_of_transformers_and_peft(
    fleet: Any, references: dict[str, Any], model: str, max_tokens: int
) -> None:
    sequences = pairs(references[model])
    body = {
        "model": model,
        "prompt": [token_ids for token_ids, _ in sequences],
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    for _ in range(2):  # the second time the prompts are in the prefix cache
        status, answer = await fleet.post("/v1/completions", body)
        assert status == 200, answer
        for choice, (token_ids, num_context) in zip(answer["choices"], sequences, strict=True):
            expected, is_greedy = of_reference(references[model], token_ids, num_context)
            value, was_greedy = of_choice(choice, num_context, -1 if max_tokens else None)
            assert value == pytest.approx(expected, abs=5 * tiny.TOLERANCE)
            assert was_greedy is is_greedy
    assert {of_reference(references[model], *pair)[1] for pair in sequences} == {True, False}


async def test_a_prompt_as_text_is_scored_as_its_tokens(fleet: Any, references: dict[str, Any]) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    body = {"model": "linears", "prompt": text, "max_tokens": 0, "logprobs": 1, "echo": True, "return_token_ids": True}
    status, answer = await fleet.post("/v1/completions", body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    assert choice["text"] == text and "".join(choice["logprobs"]["tokens"]) == text
    value, _ = of_choice(choice, 1, None)
    expected, _ = of_reference(references["linears"], choice["prompt_token_ids"], 1)
    assert value == pytest.approx(expected, abs=len(choice["prompt_token_ids"]) * tiny.TOLERANCE)
    assert answer["usage"]["completion_tokens"] == 0
