"""Time to first token of a single request, by its adapter's place: a slot, the host cache, the disk, or none."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from benchmarks import offline
from benchmarks.workloads import Workload, make_requests
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine

STATES = ("base", "slot", "host", "disk")
MAX_LORAS = 2
MAX_CPU_LORAS = 4
_SAMPLE = Workload("first-token", 1, 1, 128, 1, 0)
_TOUCH = Workload("touch", 1, 1, 16, 1, 0)


class FirstToken:
    """An engine with few slots and a small host cache, so that a few requests evict an adapter from both."""

    def __init__(self, config: EngineConfig, adapters: dict[str, Path], lora_rank: int) -> None:
        lora = LoRAConfig(max_loras=MAX_LORAS, max_lora_rank=lora_rank, max_cpu_loras=MAX_CPU_LORAS)
        fields = {name: getattr(config, name) for name in config.__slots__}
        self._engine = Engine.from_config(EngineConfig(**fields | {"lora": lora}))
        self._engine.load()
        self._engine.bind_thread()
        self._files = {name: path / "adapter_model.safetensors" for name, path in adapters.items()}
        self._digests = {name: self._engine.register_adapter(str(path)).digest for name, path in adapters.items()}
        self._turns = itertools.cycle(adapters)
        self._num_samples = 0

    def sample(self, num_samples: int, seed: int) -> dict[str, list[float]]:
        """Measure milliseconds to the first token: `num_samples` of each state, in turns."""
        times: dict[str, list[float]] = {state: [] for state in STATES}
        for number in range(num_samples):
            for state in STATES[number % 4 :] + STATES[: number % 4]:
                times[state].append(self._one(state, seed=1000 * seed + number))
        return times

    def close(self) -> None:
        self._engine.close()

    def _one(self, state: str, seed: int) -> float:
        target, *others = (next(self._turns) for _ in range(1 + MAX_CPU_LORAS))
        # In every state small requests for adapters run before, so that all samples find the same processor caches.
        history = {"base": others, "slot": [*others, target], "host": [target, *others[:MAX_LORAS]], "disk": others}
        for name in history[state]:
            self._run(_TOUCH, name, seed)
        self._check(state, self._digests[target])
        if state == "disk":
            _drop_from_page_cache(self._files[target])
        return self._run(_SAMPLE, None if state == "base" else target, seed)

    def _check(self, state: str, digest: str) -> None:
        stats = self._engine.stats()
        found = (digest in stats.device_adapters, digest in stats.host_adapters)
        expected = {"slot": (True, True), "host": (False, True)}.get(state, (False, False))
        if found != expected:
            raise RuntimeError(f"{state}: the adapter is (in a slot, in the host cache) = {found}, not {expected}")

    def _run(self, workload: Workload, adapter: str | None, seed: int) -> float:
        self._num_samples += 1
        (request,) = make_requests(workload, [], vocab_size=self._engine.vocab_size, seed=seed * 64 + self._num_samples)
        requests = [type(request)(request.prompt_token_ids, adapter)]
        return float(offline.run(self._engine, workload, requests, self._digests)["ttft_ms"]["p50"])


def _drop_from_page_cache(path: Path) -> None:
    """Drop a file from the page cache. It must have been synced, since only clean pages are dropped."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
