"""What thousands of registered adapters cost: throughput against five, with as many distinct ones in each batch.

python -m benchmarks.many_adapters [--adapters 2000] [--slots 32] [--repeat 3]

The engine alone, on a tiny random model. Five seats, so that a batch holds five requests for five different adapters
where five take turns, and nearly as many where adapters are drawn by popularity (Zipf, alpha 1) from thousands. Both
sides run in turns in engines of their own. Each adapter is asked for once beforehand, so that the host cache has it; a
slot has it for some 40 % of the requests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.random_adapters import write_adapters
from benchmarks.tiny_model import write_tiny_model
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest
from lorafleet.workers.engine.sampling_options import SamplingOptions

NUM_SEATS = 5
QUEUE = 64  # requests that wait at any time: what the engine can look ahead


class Side:
    """An engine with adapters and the order in which they are asked for."""

    def __init__(self, model: Path, paths: list[Path], weights: list[float] | None, num_slots: int) -> None:
        """weights: of each adapter; None asks for one after the other."""
        config = EngineConfig(
            model=str(model),
            dtype="float32",
            max_num_seqs=NUM_SEATS,
            num_threads=max(1, len(os.sched_getaffinity(0)) - 1),
            enable_prefix_caching=False,
            lora=LoRAConfig(max_loras=num_slots, max_lora_rank=8),
        )
        self.engine = Engine.from_config(config)
        self.engine.load()
        self.engine.bind_thread()
        self._digests = [self.engine.register_adapter(str(path)).digest for path in paths]
        self._weights = weights
        self._rng = random.Random(0)
        self._num_asked = 0
        self.num_distinct: list[int] = []  # adapters in each step

    def warm_up(self) -> None:
        """Ask for every adapter once."""
        options = SamplingOptions(max_tokens=1, temperature=0.0)
        for begin in range(0, len(self._digests), QUEUE):
            for number, digest in enumerate(self._digests[begin : begin + QUEUE]):
                self.engine.submit(GenerateRequest(f"warm-up {number}", (5,), options, digest))
            while self.engine.has_unfinished():
                self.engine.wait_for_work()
                self.engine.step()
        self.run(200)

    def run(self, num_requests: int) -> dict[str, Any]:
        """Keep `QUEUE` requests waiting until all are done."""
        engine = self.engine
        before = engine.stats()
        began = time.perf_counter()
        num_sent = num_open = 0
        adapters: dict[str, str] = {}
        num_distinct: list[int] = []
        while num_sent < num_requests or num_open:
            while num_sent < num_requests and num_open < QUEUE + NUM_SEATS:
                request = self._ask(num_sent)
                assert request.adapter is not None
                adapters[request.request_id] = request.adapter
                engine.submit(request)
                num_sent += 1
                num_open += 1
            engine.wait_for_work()
            events = engine.step()
            num_distinct.append(len({adapters[event.request_id] for event in events}))
            for event in events:
                assert event.error is None, event.error
                num_open -= event.finish is not None
        elapsed_s = time.perf_counter() - began
        after = engine.stats()
        return {
            "requests_per_s": round(num_requests / elapsed_s, 1),
            "output_tok_per_s": round((after.num_output_tokens - before.num_output_tokens) / elapsed_s, 1),
            "distinct_adapters_a_step": round(statistics.mean(count for count in num_distinct if count), 2),
            "slot_loads": after.num_slot_loads - before.num_slot_loads,
            "disk_loads": after.num_adapter_loads - before.num_adapter_loads,
        }

    def _ask(self, number: int) -> GenerateRequest:
        if self._weights is None:
            digest = self._digests[self._num_asked % len(self._digests)]
            self._num_asked += 1
        else:
            digest = self._rng.choices(self._digests, self._weights)[0]
        prompt = tuple(self._rng.randrange(3, 512) for _ in range(32))
        options = SamplingOptions(max_tokens=32, temperature=0.0, ignore_eos=True)
        return GenerateRequest(f"{number}", prompt, options, digest)


def main() -> None:
    parser = argparse.ArgumentParser(description="Thousands of adapters against five.")
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--requests", type=int, default=1000, help="of each turn")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorafleet-bench-") as scratch:
        model = write_tiny_model(Path(scratch) / "model")
        paths = list(write_adapters(model, Path(scratch) / "adapters", count=args.adapters).values())
        zipf = [1 / (rank + 1) for rank in range(args.adapters)]
        sides = {"five": Side(model, paths[:5], None, args.slots), "many": Side(model, paths, zipf, args.slots)}
        for side in sides.values():
            side.warm_up()
        rounds = []
        for _ in range(args.repeat):
            rounds.append({name: side.run(args.requests) for name, side in sides.items()})
            for name, row in rounds[-1].items():
                print(f"{name:<6}" + "  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
        ratio = statistics.median(row["many"]["requests_per_s"] / row["five"]["requests_per_s"] for row in rounds)
        print(f"many / five: {ratio:.3f}", file=sys.stderr)
        for side in sides.values():
            side.engine.close()
    json.dump(
        {"adapters": args.adapters, "slots": args.slots, "rounds": rounds, "ratio": round(ratio, 3)},
        sys.stdout,
        indent=2,
    )
    print()


if __name__ == "__main__":
    main()
