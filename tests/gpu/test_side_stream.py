"""Adapters loaded to a CUDA device while steps run on it.

The engine's other tests also run on a device if there is one, since they leave `device` at auto.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import run_engine

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.model.side_stream import SideStream
from lorafleet.workers.model.slot_write import SlotWrite
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

PROMPT = list(range(7, 40))
GREEDY = SamplingOptions(max_tokens=24, temperature=0.0, logprobs=5, ignore_eos=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "small": {"rank": 2, "targets": ["q_proj"]},
    "large": {"rank": 16, "seed": 2},
    "dora": {"rank": 4, "seed": 3, "use_dora": True},
    "biased": {"rank": 4, "seed": 4, "lora_bias": True},
}


def test_adapters_that_take_turns_in_two_slots_are_each_applied_while_the_base_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = {}
    for name, options in OPTIONS.items():
        model = tiny.make_model("smollm2", tmp_path / "model")
        adapted[name] = tiny.make_adapter(model, tmp_path / name, strength=0.3, **options)
    filled: list[torch.cuda.Stream] = []
    fill = SideStream.fill

    def seen(stream: SideStream, write: SlotWrite) -> None:
        fill(stream, write)
        assert write.advance(1), "nothing is left for the stepping thread"
        filled.append(stream._stream)

    monkeypatch.setattr(SideStream, "fill", seen)
    config = EngineConfig(model=str(tmp_path / "model"), dtype="float32", device="cuda", lora=LoRAConfig(max_loras=2))
    engine = Engine.from_config(config)
    try:
        engine.load()
        digests = {name: engine.register_adapter(str(tmp_path / name)).digest for name in OPTIONS}
        for turn in range(3):
            requests = [GenerateRequest(f"{turn}", tuple(PROMPT), GREEDY)]
            requests += [GenerateRequest(f"{turn}-{name}", tuple(PROMPT), GREEDY, digests[name]) for name in OPTIONS]
            results = run_engine(engine, requests)
            base = tiny.make_model("smollm2", tmp_path / "model")
            tiny.assert_agrees(results[f"{turn}"], base, PROMPT)
            for name, reference in adapted.items():
                tiny.assert_agrees(results[f"{turn}-{name}"], reference, PROMPT)
    finally:
        engine.close()
    assert len(filled) >= 2 * len(OPTIONS)
    assert all(stream != torch.cuda.default_stream() for stream in filled)
