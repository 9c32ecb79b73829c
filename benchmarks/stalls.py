"""Whether loading adapters holds up those who generate: gaps between tokens, quiet and with a new adapter every second.

python -m benchmarks.stalls --model DIR [--seconds 10] [--repeat 3] [--streams 8]

The engine in this process. Streams generate without end, half of them on the base model; quiet and loading intervals
take turns, and a loading one is compared with the mean of those beside it, since contexts grow. While loading, a new
rank-16 adapter is registered each second (read, verified, hashed) and asked for a few tokens at once, so that it goes
all the way from the disk into a slot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.random_adapters import write_adapters
from lorafleet.workers.adapters.aliases import Aliases
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest, RequestEvent
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.engine.thread import EngineThread

EVERY_S = 1.0


class Streams:
    """Requests that begin anew when they end, and when their tokens came."""

    def __init__(self, engine: Engine, digests: list[str | None], num_tokens: int) -> None:
        self._engine = engine
        self._digests = digests
        self._num_tokens = num_tokens
        self._numbers = itertools.count()
        self._last_s: dict[str, float] = {}
        self._gaps: list[float] = []
        self.first_token_s: dict[str, float] = {}  # of the requests for new adapters

    def start(self) -> None:
        for digest in self._digests:
            self._submit(digest)

    def take_gaps(self) -> list[float]:
        """Those since the last call, in seconds."""
        gaps, self._gaps = self._gaps, []
        return gaps

    def publish(self, step: int, events: list[RequestEvent]) -> None:
        """In the engine's thread."""
        now = time.perf_counter()
        for event in events:
            assert event.error is None, event.error
            if event.request_id.startswith("new"):
                self.first_token_s.setdefault(event.request_id, now)
                continue
            last = self._last_s.pop(event.request_id, None)
            if last is not None:
                self._gaps.append(now - last)
            if event.finish is None:
                self._last_s[event.request_id] = now
            else:
                self._submit(self._digests[int(event.request_id.split("/")[1])])

    def _submit(self, digest: str | None) -> None:
        options = SamplingOptions(max_tokens=self._num_tokens, temperature=0.0, ignore_eos=True)
        name = f"{next(self._numbers)}/{self._digests.index(digest)}"
        self._engine.submit(GenerateRequest(name, tuple(range(100, 132)), options, digest))


def load_adapters(engine: Engine, streams: Streams, paths: list[Path], seconds: float) -> list[float]:
    """Load one of `paths` each second; the milliseconds from its registration to its first token."""
    aliases: Aliases[str] = Aliases(engine)
    options = SamplingOptions(max_tokens=2, temperature=0.0, ignore_eos=True)
    asked: dict[str, float] = {}
    began = time.perf_counter()
    for number in range(int(seconds / EVERY_S)):
        time.sleep(max(0.0, began + number * EVERY_S - time.perf_counter()))
        name = f"new-{paths[number].name}-{time.monotonic_ns()}"
        asked[name] = time.perf_counter()
        digest = aliases.add(name, str(paths[number])).result().digest
        engine.submit(GenerateRequest(name, (100, 101, 102), options, digest))
    time.sleep(EVERY_S)
    for name in list(asked):
        aliases.remove(name).result()
    aliases.close()
    return [round(1e3 * (streams.first_token_s[name] - at), 1) for name, at in asked.items()]


def row(gaps: list[float]) -> dict[str, float]:
    p50, p99, p999 = np.percentile(gaps, [50, 99, 99.9])
    return {
        "num_gaps": len(gaps),
        "p50_ms": round(1e3 * float(p50), 2),
        "p99_ms": round(1e3 * float(p99), 2),
        "p99.9_ms": round(1e3 * float(p999), 2),
        "max_ms": round(1e3 * max(gaps), 2),
    }


def quiet_row(streams: Streams, seconds: float) -> dict[str, float]:
    streams.take_gaps()
    time.sleep(seconds)
    return row(streams.take_gaps())


def main() -> None:
    parser = argparse.ArgumentParser(description="Gaps between tokens while adapters are loaded.")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each interval")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorafleet-bench-") as scratch:
        model = Path(args.model)
        own = list(write_adapters(model, Path(scratch) / "own", count=4, lora_rank=16).values())
        new = list(write_adapters(model, Path(scratch) / "new", count=int(args.seconds) + 1, lora_rank=16).values())
        config = EngineConfig(model=args.model, num_threads=args.num_threads, lora=LoRAConfig(max_loras=8))
        engine = Engine.from_config(config)
        engine.load()
        digests: list[str | None] = [engine.register_adapter(str(path)).digest for path in own]
        half = args.streams // 2
        streams = Streams(engine, [None] * (args.streams - half) + [digests[i % 4] for i in range(half)], 4000)
        thread = EngineThread(engine, streams.publish, lambda error: os._exit(1))
        thread.start()
        streams.start()
        time.sleep(3.0)
        rows: list[dict[str, Any]] = []
        ratios = []
        before = quiet_row(streams, args.seconds)
        for repeat in range(args.repeat):
            first = load_adapters(engine, streams, new, args.seconds)
            loading = row(streams.take_gaps())
            after = quiet_row(streams, args.seconds)
            ratios.append(2 * loading["p99_ms"] / (before["p99_ms"] + after["p99_ms"]))
            rows.append({"before": before, "loading": loading, "after": after, "disk_to_first_token_ms": first})
            print(
                f"{repeat}: p50, p99, max: quiet {before['p50_ms']} {before['p99_ms']} {before['max_ms']} ms, loading "
                f"{loading['p50_ms']} {loading['p99_ms']} {loading['max_ms']} ms, quiet {after['p50_ms']} "
                f"{after['p99_ms']} {after['max_ms']} ms; p99 ratio {ratios[-1]:.3f}; disk to first token "
                f"{statistics.median(first):.0f} ms",
                file=sys.stderr,
            )
            before = after
        thread.stop()
        engine.close()
    json.dump({"rounds": rows, "p99_ratio": round(statistics.median(ratios), 3)}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
