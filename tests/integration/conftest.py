"""Servers and models that the integration tests share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from serving import ADAPTERS, Server, start


@pytest.fixture(scope="session")
def demo_server(demo_model: Path) -> Iterator[Server]:
    """The demo as `make demo` starts it, in float32, so that it can be compared with the reference."""
    modules = [f"{name}=examples/adapters/{name}" for name in ADAPTERS]
    # json is given in vLLM's JSON form.
    modules[2] = json.dumps({"name": "json", "path": "examples/adapters/json", "base_model_name": "smollm2"})
    server = start(
        str(demo_model),
        "--served-model-name",
        "smollm2",
        "--dtype",
        "float32",
        "--enable-lora",
        "--lora-modules",
        *modules,
    )
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of 1,024 positions with a tokenizer and one good adapter beside it (../good)."""
    root = tmp_path_factory.mktemp("tiny")
    model = tiny.make_model("smollm2", root / "model", max_position_embeddings=1024)
    tiny.save_tokenizer(root / "model")
    tiny.make_adapter(model, root / "good")
    return root / "model"
