"""Adapters are loaded, replaced and unloaded under traffic that exceeds the limits: every answer comes and is correct,
and nothing remains.

A run of minutes or hours, over any model: `python -m benchmarks.churn`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from benchmarks.churn_run import MAX_COMPOSED, Churn, ChurnSettings, Reference
from benchmarks.random_adapters import write_adapters
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.scheduling.request import FinishReason

NAMES = [f"n{i}" for i in range(12)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("churn")
    tiny.make_model("qwen2", root / "model")
    return root


@pytest.fixture(scope="module")
def contents(root: Path) -> list[Path]:
    return list(write_adapters(root / "model", root / "contents", count=24, lora_rank=4, strength=0.5).values())


def make_engine(root: Path, *, max_loras: int, **changes: Any) -> Engine:
    lora = LoRAConfig(max_loras=max_loras, max_cpu_loras=max(max_loras, 8))
    config = EngineConfig(
        model=str(root / "model"), dtype="float32", num_threads=1, max_model_len=96, lora=lora, **changes
    )
    engine = Engine.from_config(config)
    engine.load()
    engine.bind_thread()
    return engine


@pytest.fixture(scope="module")
def reference(root: Path, contents: list[Path]) -> Iterator[Reference]:
    engine = make_engine(root, max_loras=MAX_COMPOSED, max_num_seqs=1)
    yield Reference(engine, contents)
    engine.close()


@pytest.mark.parametrize("seed", range(3))
def test_churn(seed: int, root: Path, contents: list[Path], reference: Reference, tmp_path: Path) -> None:
    """Slots for 4 of 12 adapters, host memory for 8, pages for a few long requests of 16."""
    engine = make_engine(root, max_loras=4, max_num_seqs=16, kv_cache_memory_bytes=110_000)
    settings = ChurnSettings(
        num_requests=600,
        arrival_rate=400.0,
        composed_share=0.15,
        abort_rate=20.0,
        reload_rate=12.0,
        retire_rate=12.0,
        step_s=0.001,
        seed=seed,
    )
    churn = Churn(engine, contents, NAMES, tmp_path, settings)
    result = churn.run()
    assert len(result.asks) + result.num_refused == settings.num_requests
    assert all(ask.num_terminal == 1 for ask in result.asks)
    wrong = [ask for ask in result.asks if not reference.is_right(ask)]
    assert not wrong, [(ask.names, ask.contents, ask.finish, ask.error, ask.token_ids) for ask in wrong[:3]]
    # Everything the test is about did happen.
    ends = Counter(ask.finish for ask in result.asks)
    assert ends[FinishReason.LENGTH] > 200 and ends[FinishReason.STOP] and ends[FinishReason.CANCELLED]
    answered = {content for ask in result.asks for content, _ in ask.contents}
    assert len(answered) > 12, "names stood for more than one content"
    assert sum(ask.finish is not FinishReason.CANCELLED for ask in result.asks if len(ask.names) > 1) > 30
    assert result.num_reloads > 5 and result.num_retired > 2
    stats = engine.stats()
    assert stats.num_preemptions > 10
    assert stats.num_slot_loads > 25 and stats.num_adapter_loads > 20
    # And nothing remains.
    churn.close()
    engine.check_integrity()
    engine._store.check_integrity()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_pages) == (0, 0, stats.num_pages)
    assert stats.device_adapters == stats.host_adapters == ()
    assert engine._store.stats().num_registered == stats.host_cache_bytes == engine._store.num_open_files == 0
    engine.close()
