"""A child process that holds engines: measures them without Ray, gRPC and HTTP, and the machine's own speed.

python -m benchmarks.engine_child MODEL ADAPTERS MAX_LORAS LORA_RANK KV_BYTES MAX_MODEL_LEN
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import machine, offline
from benchmarks.child import answer_calls
from benchmarks.first_token import FirstToken
from benchmarks.workloads import Workload, make_requests
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.model.architecture import read_model_spec


class EngineChild:
    """The engines; each is created by the first call that needs it, and stays."""

    def __init__(self, config: EngineConfig, adapters: dict[str, Path], lora_rank: int) -> None:
        self._config = config
        self._adapters = adapters
        self._lora_rank = lora_rank
        self._engine: Engine | None = None
        self._digests: dict[str, str] = {}
        self._first_token: FirstToken | None = None

    def run(self, workload: dict[str, Any], seed: int, vocab_size: int) -> dict[str, Any]:
        """Run a workload on the engine alone."""
        if self._engine is None:
            self._engine = Engine.from_config(self._config)
            self._engine.load()
            self._engine.bind_thread()
            for name, path in self._adapters.items():
                self._digests[name] = self._engine.register_adapter(str(path)).digest
        made = Workload(**workload)
        requests = make_requests(made, list(self._digests), vocab_size=vocab_size, seed=seed)
        return offline.run(self._engine, made, requests, self._digests)

    def first_token(self, num_samples: int, seed: int) -> dict[str, list[float]]:
        """Return milliseconds to the first token by the adapter's state."""
        if self._first_token is None:
            self._first_token = FirstToken(self._config, self._adapters, self._lora_rank)
            self._first_token.sample(1, seed=-1)  # warm-up
        return self._first_token.sample(num_samples, seed)

    def speed(self) -> dict[str, float]:
        """Return the machine's speed, and its bounds for this model: time to read the weights once, tokens a second."""
        spec = read_model_spec(Path(self._config.model))
        matrix = spec.vocab_size * spec.hidden_size  # the embeddings, and the head, which a step reads
        body = spec.num_parameters - matrix * (1 if spec.tie_embeddings else 2)
        read_bytes_per_s = machine.read_bytes_per_s()
        flop_per_s = machine.matmul_flop_per_s()
        return {
            "read_gb_per_s": read_bytes_per_s / 1e9,
            "bf16_tflop_per_s": flop_per_s / 1e12,
            "weight_read_ms": 1e3 * 2 * (body + matrix) / read_bytes_per_s,
            "prompt_tok_per_s": flop_per_s / (2 * body),
        }


def main() -> None:
    model, adapters_dir, max_loras, lora_rank, kv_bytes, max_model_len = sys.argv[1:]
    config = EngineConfig(
        model=model,
        dtype="bfloat16",
        max_model_len=int(max_model_len),
        kv_cache_memory_bytes=int(kv_bytes),
        lora=LoRAConfig(max_loras=int(max_loras), max_lora_rank=int(lora_rank)),
    )
    adapters = {path.name: path for path in sorted(Path(adapters_dir).iterdir())}
    child = EngineChild(config, adapters, int(lora_rank))
    answer_calls({"run": child.run, "first_token": child.first_token, "speed": child.speed, "facts": machine.facts})


if __name__ == "__main__":
    main()
