"""A real engine behind a real worker service, for the tests' gateway, without Ray."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

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
MAX_MODEL_LEN = 256
ADAPTERS: dict[str, dict[str, Any]] = {
    "linears": {},
    "head": {"targets": ["v_proj", "lm_head"], "save_embedding_layers": False},
}
MODELS = ("base", *ADAPTERS)


def make_models(root: Path) -> dict[str, Any]:
    """Save a tiny model, its tokenizer and its adapters below `root`; return transformers' and peft's, by name."""
    tiny.make_model("llama3", root / "base")
    tiny.save_tokenizer(root / "base")
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).eval()
    models = {"base": base}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        models[name] = tiny.make_adapter(copy.deepcopy(base), root / name, seed=seed + 3, strength=0.2, **options)
    return models


@asynccontextmanager
async def real_worker(root: Path, fleet: Any) -> AsyncIterator[Engine]:
    """Let a gateway without workers have one with a real engine, which computes prompts in several steps."""
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
    cast(Any, worker_pb2_grpc.add_WorkerServicer_to_server)(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    service.start()
    files = ("tokenizer.json", "tokenizer_config.json", "config.json")
    fleet.controller.files["real"] = {name: (root / "base" / name).read_bytes() for name in files}
    worker = controller_pb2.WorkerEndpoint(
        worker_id="real",
        generation=1,
        address=f"127.0.0.1:{port}",
        state=worker_pb2.WORKER_READY,
        max_num_seqs=4,
        max_loras=2,
    )
    base = controller_pb2.BaseModel(
        names=["base"], tokenizer_digest="real", max_model_len=MAX_MODEL_LEN, vocab_size=engine.vocab_size
    )
    table = controller_pb2.RoutingTable(incarnation="real", version=1, base=base, workers=[worker])
    for name, digest in digests.items():
        table.adapters.add(name=name, digest=digest, version=1, parent="base")
    fleet.controller.table.CopyFrom(table)
    fleet.controller.publish()
    await fleet.ready()
    yield engine
    await fleet.listener.close()
    await server.stop(None)
    await service.stop()
    await asyncio.to_thread(engine.close)
