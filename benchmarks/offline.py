"""The engine alone: no Ray, no gRPC, no HTTP, no text.

python -m benchmarks.offline --model DIR [--workload NAME ...] [--repeat 1] [--max-loras 16]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Timeline, report, summarise
from benchmarks.random_adapters import write_adapters
from benchmarks.workloads import WORKLOADS, BenchRequest, Workload, make_requests
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest
from lorafleet.workers.engine.sampling_options import SamplingOptions


def run(engine: Engine, workload: Workload, requests: list[BenchRequest], digests: dict[str, str]) -> dict[str, Any]:
    """One run of a workload; asserts that every request got all its tokens."""
    options = SamplingOptions(max_tokens=workload.num_output_tokens, temperature=0.0, ignore_eos=True)
    timelines: dict[str, Timeline] = {}
    pending = list(enumerate(requests))
    began = time.perf_counter()
    num_open = 0
    while pending or num_open:
        while pending and num_open < workload.concurrency:
            number, request = pending.pop(0)
            digest = None if request.adapter is None else digests[request.adapter]
            timelines[str(number)] = Timeline(time.perf_counter())
            engine.submit(GenerateRequest(str(number), request.prompt_token_ids, options, digest))
            num_open += 1
        engine.wait_for_work()
        for event in engine.step():
            assert event.error is None, event.error
            if event.token_id is not None:
                timelines[event.request_id].token_s.append(time.perf_counter())
            num_open -= event.finish is not None
    elapsed_s = time.perf_counter() - began
    assert all(len(timeline.token_s) == workload.num_output_tokens for timeline in timelines.values())
    return summarise(workload, list(timelines.values()), elapsed_s)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the engine in this process.")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each workload, interleaved")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-loras", type=int, default=None, help="slots; default: 8 for adapters-64, else 16")
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lorafleet-bench-") as scratch:
        adapters = write_adapters(Path(args.model), Path(scratch), count=64)
        groups: dict[int, list[Workload]] = {}
        for name in args.workload:
            slots = args.max_loras or (8 if name == "adapters-64" else 16)
            groups.setdefault(slots, []).append(WORKLOADS[name])
        for slots, workloads in groups.items():
            config = EngineConfig(
                model=args.model, dtype=args.dtype, num_threads=args.num_threads, lora=LoRAConfig(max_loras=slots)
            )
            engine = Engine.from_config(config)
            engine.load()
            engine.bind_thread()
            digests = {name: engine.register_adapter(str(path)).digest for name, path in adapters.items()}
            warm_up = Workload("warm-up", 4, 4, 64, 8, 2)
            run(engine, warm_up, make_requests(warm_up, list(digests), vocab_size=engine.vocab_size), digests)
            for repeat in range(args.repeat):
                for workload in workloads:
                    requests = make_requests(workload, list(digests), vocab_size=engine.vocab_size, seed=repeat)
                    rows.append(run(engine, workload, requests, digests))
            engine.close()
    report("engine", rows)


if __name__ == "__main__":
    main()
