"""A worker's adapters by name and version: read side by side, identified by the answered load, pinned by name."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tiny

from lorafleet.proto import worker_pb2
from lorafleet.workers.adapters.folder import AdapterFolder
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine import registered
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import (
    AdapterConflictError,
    AdapterRefusedError,
    AdapterUnavailableError,
    UnknownModelError,
)
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.server.adapter_registry import AdapterRegistry
from lorafleet.workers.sources.adapters import resolve_adapter

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("registry")
    model = tiny.make_model("smollm2", root / "model")
    tiny.save_tokenizer(root / "model")
    for seed, name in enumerate("abc"):
        tiny.make_adapter(copy.deepcopy(model), root / name, seed=seed + 1)
    return root


@pytest.fixture
def engine(root: Path) -> Iterator[Engine]:
    lora = LoRAConfig(max_loras=2)
    config = EngineConfig(model=str(root / "model"), dtype="float32", lora=lora, num_threads=1)
    engine = Engine.from_config(config)
    engine.load()
    engine.bind_thread()
    yield engine
    engine.close()


@pytest.fixture
def registry(engine: Engine) -> Iterator[AdapterRegistry]:
    registry = AdapterRegistry(engine)
    yield registry
    registry.close()


def register(registry: AdapterRegistry, name: str, version: int, path: Path, **fields: object) -> worker_pb2.Adapter:
    request = worker_pb2.RegisterAdapterRequest(name=name, version=version, root=str(path), **fields)  # type: ignore[arg-type]
    return registry.register(request).result(TIMEOUT_S)


def unregister(registry: AdapterRegistry, engine: Engine, name: str, version: int) -> None:
    freed = registry.unregister(name, version).result(TIMEOUT_S)
    while freed is not None and not freed.done():
        engine.step()


def test_a_hung_read_holds_up_no_other_name(
    registry: AdapterRegistry, engine: Engine, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()

    def slow(path: str, roots: Sequence[str] | None = None) -> AdapterFolder:
        if path.endswith("/a"):
            assert answers.wait(TIMEOUT_S)
        return resolve_adapter(path, roots)

    monkeypatch.setattr(registered, "resolve_adapter", slow)
    requests = [worker_pb2.RegisterAdapterRequest(name=f"x{n}", version=1, root=str(root / "a")) for n in range(6)]
    hung = [registry.register(request) for request in requests]
    assert register(registry, "y", 1, root / "b").name == "y"
    unregister(registry, engine, "y", 1)
    assert not any(future.done() for future in hung)
    assert [adapter.name for adapter in registry.all()] == []
    answers.set()
    assert {future.result(TIMEOUT_S).name for future in hung} == {f"x{n}" for n in range(6)}


def test_what_was_given_up_is_not_registered_when_its_read_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model=str(root / "model"), dtype="float32", lora=LoRAConfig(), adapter_read_timeout_s=0.1)
    engine = Engine.from_config(config)
    registry = AdapterRegistry(engine)
    answers, ended = threading.Event(), threading.Event()

    def hangs(path: str, roots: Sequence[str] | None = None) -> AdapterFolder:
        assert answers.wait(TIMEOUT_S)
        ended.set()
        return resolve_adapter(path, roots)

    monkeypatch.setattr(registered, "resolve_adapter", hangs)
    with pytest.raises(AdapterUnavailableError, match="given up"):
        register(registry, "x", 1, root / "a")
    with pytest.raises(UnknownModelError):
        registry.unregister("x", 1).result(TIMEOUT_S)
    answers.set()
    assert ended.wait(TIMEOUT_S)
    monkeypatch.undo()
    register(registry, "y", 1, root / "b")
    registry.close()
    assert [adapter.name for adapter in registry.all()] == ["y"]
    assert len(engine.stats().registered_adapters) == 1
    engine.close()


def test_the_same_request_again_is_answered_without_another_look(registry: AdapterRegistry, root: Path) -> None:
    shutil.copytree(root / "a", root / "moving")
    first = register(registry, "x", 1, root / "moving", created=5)
    shutil.rmtree(root / "moving")
    assert register(registry, "x", 1, root / "moving", created=5) == first


def test_another_load_under_the_same_version_is_read(registry: AdapterRegistry, engine: Engine, root: Path) -> None:
    """The first answer was lost, so its version is used again."""
    first = register(registry, "x", 1, root / "a", created=5)
    second = register(registry, "x", 1, root / "b", created=6)
    assert first.digest != second.digest
    assert registry.all() == [second]
    engine.step()
    assert engine.stats().registered_adapters == (second.digest,)


def test_a_pinned_adapter_is_replaced_in_place_where_no_more_could_be_pinned(
    registry: AdapterRegistry, engine: Engine, root: Path
) -> None:
    register(registry, "x", 1, root / "a", pin=True)
    second = register(registry, "x", 2, root / "b", pin=True)
    with pytest.raises(AdapterConflictError, match="1 of 2 slots hold pinned adapters; the limit is 1"):
        register(registry, "y", 1, root / "c", pin=True)
    assert {adapter.name for adapter in registry.all()} == {"x"}
    unregister(registry, engine, "x", 1)
    assert engine._adapters._pinned == {second.digest}
    unregister(registry, engine, "x", 2)
    register(registry, "y", 1, root / "c", pin=True)


def test_a_broken_tokenizer_is_refused_and_leaves_nothing(
    registry: AdapterRegistry, engine: Engine, root: Path
) -> None:
    broken = root / "broken"
    shutil.copytree(root / "a", broken)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(AdapterRefusedError) as refused:
        register(registry, "x", 1, broken)
    assert refused.value.reason == "bad_tokenizer"
    assert registry.all() == [] and engine.stats().registered_adapters == ()


def test_text_that_was_registered_is_given_after_its_directory_is_gone(registry: AdapterRegistry, root: Path) -> None:
    own = root / "own"
    shutil.copytree(root / "a", own)
    (own / "chat_template.jinja").write_text("OWN {{ messages }}")
    adapter = register(registry, "x", 1, own)
    shutil.rmtree(own)
    files = registry.text_files(adapter.text_digest).result(TIMEOUT_S)
    assert files is not None and files["chat_template.jinja"] == b"OWN {{ messages }}"
    registry.unregister("x", 1).result(TIMEOUT_S)
    assert registry.text_files(adapter.text_digest).result(TIMEOUT_S) is None


def test_grammars_know_the_tokenizer_that_was_registered_with_an_adapter(
    registry: AdapterRegistry, engine: Engine, root: Path
) -> None:
    own = root / "swapped"
    shutil.copytree(root / "a", own)
    files = json.loads((root / "model" / "tokenizer.json").read_text())
    vocab = files["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    (own / "tokenizer.json").write_text(json.dumps(files))
    adapter = register(registry, "x", 1, own)
    (own / "tokenizer.json").unlink()
    engine.use_tokenizers(registry.tokenizer)
    engine.prepare_grammars()
    sampling = SamplingOptions(max_tokens=9, grammar='start: "xyx"')
    ours = GenerateRequest("own", (5, 6), sampling, adapter.digest, text_digest=adapter.text_digest)
    base = GenerateRequest("base", (5, 6), sampling)
    results = tiny.run_engine(engine, [ours, base])
    x, y = vocab["x"], vocab["y"]
    assert results["own"].token_ids == [x, y, x] and results["base"].token_ids == [y, x, y]
    registry.unregister("x", 1).result(TIMEOUT_S)
    assert registry.tokenizer(adapter.text_digest) is None


def test_files_that_changed_are_not_taken_for_what_was_loaded_be_they_weights_or_a_template(
    registry: AdapterRegistry, engine: Engine, root: Path
) -> None:
    """Requests as to a worker that has lost its memory."""
    shutil.copytree(root / "a", root / "own")
    (root / "own" / "chat_template.jinja").write_text("first")
    first = register(registry, "x", 1, root / "own")
    told = {"digest": first.digest, "text_digest": first.text_digest}
    assert register(registry, "x", 1, root / "own", **told) == first
    unregister(registry, engine, "x", 1)
    assert register(registry, "x", 1, root / "own", **told).text_digest == first.text_digest
    unregister(registry, engine, "x", 1)
    (root / "own" / "chat_template.jinja").write_text("second")
    with pytest.raises(AdapterRefusedError, match="have changed") as caught:
        register(registry, "x", 1, root / "own", **told)
    assert caught.value.reason == "changed"
    (root / "own" / "chat_template.jinja").write_text("first")
    shutil.copy(root / "b" / "adapter_model.safetensors", root / "own")
    with pytest.raises(AdapterRefusedError, match="have changed"):
        register(registry, "x", 1, root / "own", **told)
