"""The table of targets: each figure, what it is compared with, and the limit.

Pure data and arithmetic. `record.py` keeps the measurements, `compare.py` takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.workloads import WORKLOADS, Workload

LORA_RANK = 8
MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 64
SERVER_LORAS = 16  # slots of our server and vLLM's
ENGINE_LORAS = 8  # slots of the engine alone, for which 64 adapters take turns
NUM_ADAPTERS = 64
KV_BYTES = 512 << 20  # 23,301 tokens of the demo model; the largest workload here touches 12,288
_KV_GIB = KV_BYTES / 2**30

_COMPARED = (
    replace(WORKLOADS["single"], num_requests=2),
    replace(WORKLOADS["single-adapter"], num_requests=2),
    *(WORKLOADS[name] for name in ("base", "adapters-1", "adapters-4", "adapters-16", "long", "long-adapters-4")),
    Workload("http-1", 4, 1, 128, 64, 0),
    Workload("http-8", 24, 8, 128, 64, 0),
    Workload("base-8", 64, 8, 128, 64, 0),
    WORKLOADS["adapters-64"],
)
COMPARED = {workload.name: workload for workload in _COMPARED}


@dataclass(frozen=True, slots=True)
class Figure:
    """A number measured in each round. Sides: ours and vllm (servers over HTTP), engine, transformers."""

    side: str
    workload: str  # one of COMPARED, or: speed, first-token, start, memory
    metric: str  # a key of its result; `ttft_ms.p50` is a key below a key
    label: str = ""  # its name in the table, if not `side`


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table. limit None: there is no target for this pair."""

    row: str
    title: str
    unit: str
    ours: Figure
    peer: Figure | None
    relation: str  # ratio: ours / peer, difference: ours - peer, value: ours
    at_most: bool  # else: at least
    reach: float | None = None
    aim: float | None = None

    def value(self, ours: float, peer: float | None) -> float:
        if self.relation == "value" or peer is None:
            return ours
        return ours / peer if self.relation == "ratio" else ours - peer

    def is_met(self, value: float, limit: float | None) -> bool | None:
        return None if limit is None else (value <= limit if self.at_most else value >= limit)

    def limit_text(self, limit: float | None) -> str:
        sign = "+" if self.relation == "difference" else ""
        return "" if limit is None else f"{'<=' if self.at_most else '>='} {sign}{limit:.4g}"

    @property
    def figures(self) -> tuple[Figure, ...]:
        return (self.ours,) if self.peer is None else (self.ours, self.peer)


def _single() -> Iterator[Check]:
    floor = Figure("engine", "speed", "weight_read_ms", "reading weights")
    for what, name, reach in (("base", "single", 0.5), ("adapter", "single-adapter", 0.22)):
        ours = Figure("ours", name, "tpot_ms")
        vllm = Figure("vllm", name, "tpot_ms")
        yield Check("single", f"single stream, {what}", "ms/token", ours, vllm, "ratio", True, reach)
        yield Check("single", f"single stream, {what}", "ms/token", ours, floor, "ratio", True, aim=1.5)


def _batch() -> Iterator[Check]:
    def speed(side: str, name: str, label: str = "") -> Figure:
        return Figure(side, name, "output_tok_per_s", label)

    title, ours = "32 requests, base", speed("ours", "base")
    yield Check("base", title, "tok/s", ours, speed("vllm", "base"), "ratio", False, 1.7, 2.5)
    yield Check("base", title, "tok/s", ours, speed("transformers", "base"), "ratio", False, 1.5)
    for count, reach in ((1, 7.0), (4, 10.0), (16, 10.0)):
        name = f"adapters-{count}"
        title = f"32 requests, {count} adapter{'s' * (count > 1)}"
        yield Check("adapters", title, "tok/s", speed("ours", name), speed("vllm", name), "ratio", False, reach, 12.0)
        base = speed("ours", "base", "our base")
        yield Check("adapters", title, "tok/s", speed("ours", name), base, "ratio", False, 0.85, 0.92)
    title, base = "64 adapters, 8 slots (engine)", speed("engine", "base-8", "our base at 8")
    yield Check("slots", title, "tok/s", speed("engine", "adapters-64"), base, "ratio", False, 0.80, 0.95)


def _long() -> Iterator[Check]:
    def speed(side: str, name: str, label: str = "") -> Figure:
        return Figure(side, name, "prompt_tok_per_s", label)

    products = speed("engine", "speed", "bf16 products")
    for what, name, reach, bound, aim in (
        ("base", "long", 1.7, products, 0.8),
        ("4 adapters", "long-adapters-4", 6.0, speed("ours", "long", "our base"), 0.9),
    ):
        ours, title = speed("ours", name), f"1,500-token prompts, {what}"
        yield Check("long", title, "tok/s", ours, speed("vllm", name), "ratio", False, reach)
        yield Check("long", title, "tok/s", ours, bound, "ratio", False, aim=aim)


def _first_token() -> Iterator[Check]:
    base = Figure("engine", "first-token", "base", "base")
    for what, state, reach, aim in (
        ("in a slot", "slot", 1.2, 1.1),
        ("in the host cache", "host", 1.3, 1.15),
        ("on disk", "disk", 1.6, 1.3),
    ):
        ours = Figure("engine", "first-token", state)
        yield Check("first-token", f"first token, adapter {what}", "ms", ours, base, "ratio", True, reach, aim)


def _http() -> Iterator[Check]:
    for concurrency, name in ((1, "http-1"), (8, "http-8"), (32, "base")):
        for what, metric, limit in (("first token", "ttft_ms.p50", 5.0), ("a token", "itl_ms.p50", 1.0)):
            ours, engine = Figure("ours", name, metric), Figure("engine", name, metric, "engine alone")
            title = f"HTTP at {concurrency}, {what}, p50"
            yield Check("http", title, "ms", ours, engine, "difference", True, limit, limit / 2)


def _start() -> Iterator[Check]:
    ready = Figure("ours", "start", "ready_s")
    yield Check("start", "start to ready", "s", ready, None, "value", True, 20.0, 12.0)
    memory = Figure("ours", "memory", "pss_gib")
    title = f"memory of all processes, KV {_KV_GIB:.2g} GiB"
    yield Check("start", title, "GiB", memory, None, "value", True, 2.5 + _KV_GIB, 2.0 + _KV_GIB)


CHECKS = (*_single(), *_batch(), *_long(), *_first_token(), *_http(), *_start())
ROWS = tuple(dict.fromkeys(check.row for check in CHECKS))
