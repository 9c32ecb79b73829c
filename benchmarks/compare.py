"""Compares us with our targets and with other servers: one run, one table, one JSON, one chart.

    python -m benchmarks.compare [--vllm PYTHON] [--rows NAME ...] [--repeat 5] [--out DIR]

All sides run on this machine, one at a time, in turns, so that a drift of its speed affects all of them. Every started
process is ended, also on Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import chart, processes
from benchmarks.peers import REPOSITORY, VOCAB_SIZE, Child, Server
from benchmarks.random_adapters import write_adapters
from benchmarks.record import Outcome, Record, against
from benchmarks.sides import Sides
from benchmarks.targets import CHECKS, COMPARED, LORA_RANK, NUM_ADAPTERS, ROWS, Check
from benchmarks.workloads import Workload

_Side = TypeVar("_Side", Server, Child)

_WARM_UP = Workload("warm-up", 16, 16, 128, 8, 0)
_TRIAL = Workload("trial", 16, 16, 128, 32, 0)
_WARM_UP_SEED = 1 << 20  # rounds' seeds are far below this
_FIRST_TOKEN_SAMPLES = 10  # per state and round
_NUM_STARTS = 5
_IDLE_CORES = 0.05  # an idle side that uses more is reported
_QUIET_CORES = 0.2  # the most that all others use together before a side's turn
_QUIET_TIMEOUT_S = 10.0


class Comparison:
    """Starts the sides, measures in rounds, keeps the record. A side that fails loses only its own lines."""

    def __init__(self, sides: Sides, checks: Sequence[Check], stack: contextlib.ExitStack) -> None:
        self.record = Record()
        self.settings: dict[str, Any] = {}
        self._sides = sides
        self._stack = stack
        self._began = time.monotonic()
        self._wanted = list(dict.fromkeys((figure.side, figure.workload) for c in checks for figure in c.figures))
        self._running: dict[str, Server | Child] = {}  # ours, engine, transformers, vllm, vllm-lora

    def say(self, text: str) -> None:
        seconds = int(time.monotonic() - self._began)
        print(f"[{seconds // 60:3}:{seconds % 60:02}] {text}", file=sys.stderr, flush=True)

    def start(self, *, with_transformers: bool) -> None:
        """Start the sides, ours first and alone, since its start is measured."""
        if self._wants("ours"):
            self._try("ours", None, None, self._start_ours)
        if self._wants("engine"):
            self._try("engine", None, None, lambda: self._keep("engine", self._sides.engine()))
        if self._wants("transformers"):
            if with_transformers:
                start = self._sides.transformers
                self._try("transformers", None, None, lambda: self._keep("transformers", start()))
            else:
                self.record.fail("transformers", None, None, "not run (--no-transformers)")
        if self._wants("vllm"):
            if self._sides.vllm_python:
                self._start_vllm()
            else:
                self.record.fail("vllm", None, None, "not run (give --vllm PYTHON)")
        for name, side in self._running.items():
            self._try(name, None, None, partial(self._warm_up, name, side))
        # An idle side must not disturb the others' turns. Measured here: ours uses 1-3 % of a core (Ray's), vLLM 1 %, a
        # child 0, so none has to be stopped for the others. For the time just after a turn see _wait_for_quiet.
        idle = {name: round(processes.cpu_share([side.pid]), 3) for name, side in self._running.items()}
        self.settings["idle_cores"] = idle
        self.say(f"idle cores: {idle}")
        for name, share in idle.items():
            if share > _IDLE_CORES:
                self.say(f"warning: {name} takes {share:.2f} cores while idle, which slows the others down")

    def measure(self, repeat: int) -> None:
        """Measure `repeat` rounds of everything; the sides' order changes with each round."""
        order = ["speed", *COMPARED, "first-token"]
        for number in range(repeat):
            for workload in order:
                sides = [side for side, name in self._wanted if name == workload]
                for side in sides if number % 2 == 0 else reversed(sides):
                    if self._process(side, workload) is not None:
                        self._try(side, workload, number, partial(self._measure, side, workload, number, repeat))
        if ("ours", "memory") in self._wanted and "ours" in self._running:
            self._try("ours", "memory", 0, self._measure_memory)

    def facts(self) -> dict[str, Any]:
        """Return the engine process's facts about the machine."""
        child = self._running.get("engine")
        return child.call("facts") if isinstance(child, Child) else {}

    def _wants(self, side: str) -> bool:
        return any(name == side for name, _ in self._wanted)

    def _try(self, side: str, workload: str | None, number: int | None, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self.say(f"{side} {workload or ''} FAILED: {text}")
            self.record.fail(side.removesuffix("-lora"), workload, number, text)

    def _keep(self, name: str, side: _Side) -> _Side:
        self._running[name] = self._stack.enter_context(side)
        return side

    def _start_ours(self) -> None:
        for number in range(_NUM_STARTS):
            server = self._sides.lorafleet()
            self.say(f"ours ready after {server.ready_s:.1f} s")
            self.record.add("ours", "start", number, {"ready_s": server.ready_s})
            if number < _NUM_STARTS - 1:
                server.stop()
            else:
                self._keep("ours", server)

    def _start_vllm(self) -> None:
        """Start one server for base rows and one with LoRA, each with its better way to bind threads."""
        workloads = {name for side, name in self._wanted if side == "vllm"}
        for name, lora in (("vllm", False), ("vllm-lora", True)):
            if any(bool(COMPARED[workload].num_adapters) == lora for workload in workloads):
                self._try(name, None, None, partial(self._start_best_vllm, name, lora))

    def _start_best_vllm(self, name: str, lora: bool) -> None:
        trials: dict[str, float] = {}
        trial = dataclasses.replace(_TRIAL, num_adapters=4 * lora)
        for bind in self._sides.binds():
            with self._sides.vllm(lora=lora, bind=bind) as server:
                server.run(dataclasses.replace(_WARM_UP, num_adapters=4 * lora), _WARM_UP_SEED)
                trials[bind] = server.run(trial, _WARM_UP_SEED + 1)["output_tok_per_s"]
            self.say(f"{name} with threads bound to {bind}: {trials[bind]} tok/s")
        best = max(trials, key=lambda bind: trials[bind])
        server = self._keep(name, self._sides.vllm(lora=lora, bind=best))
        self.settings[name] = {"bind": best, "trials_tok_per_s": trials, "ready_s": round(server.ready_s, 1)}

    def _process(self, side: str, workload: str) -> Server | Child | None:
        lora = side == "vllm" and COMPARED[workload].num_adapters > 0
        return self._running.get(f"{side}-lora" if lora else side)

    def _warm_up(self, name: str, process: Server | Child) -> None:
        for workload in (_WARM_UP, Workload("warm-up", 2, 2, 1500, 2, 0)):
            with_adapters = name in ("ours", "engine", "vllm-lora")
            for num_adapters in (0, 4) if name in ("ours", "engine") else (4 * with_adapters,):
                self._run(process, dataclasses.replace(workload, num_adapters=num_adapters), _WARM_UP_SEED)

    def _wait_for_quiet(self, process: Server | Child | None) -> None:
        """Wait until the other sides are idle: after its last request vLLM's engine polls for a second on a core."""
        others = [side for side in self._running.values() if side is not process]
        deadline = time.monotonic() + _QUIET_TIMEOUT_S
        while (cores := processes.cpu_share([side.pid for side in others], 0.5)) > _QUIET_CORES:
            if time.monotonic() > deadline:
                self.say(f"warning: the other sides still take {cores:.2f} cores, which slows this one down")
                return

    def _measure(self, side: str, workload: str, number: int, repeat: int) -> None:
        process = self._process(side, workload)
        self._wait_for_quiet(process)
        if workload in COMPARED:
            assert process is not None
            result = self._run(process, COMPARED[workload], number)
        else:
            assert isinstance(process, Child)
            arguments = {"num_samples": _FIRST_TOKEN_SAMPLES, "seed": number} if workload == "first-token" else {}
            result = process.call(workload.replace("-", "_"), **arguments)
        self.record.add(side, workload, number, result)
        shown = {key: result[key] for key in ("output_tok_per_s", "prompt_tok_per_s", "tpot_ms") if key in result}
        self.say(f"{number + 1}/{repeat} {side} {workload} {shown or ''}")

    def _run(self, process: Server | Child, workload: Workload, seed: int) -> dict[str, Any]:
        if isinstance(process, Server):
            return process.run(workload, seed)
        fields = dataclasses.asdict(workload)
        result: dict[str, Any] = process.call("run", workload=fields, seed=seed, vocab_size=VOCAB_SIZE)
        return result

    def _measure_memory(self) -> None:
        gib = processes.pss_bytes(self._running["ours"].pid) / 2**30
        self.record.add("ours", "memory", 0, {"pss_gib": round(gib, 3)})


def table(outcomes: Sequence[Outcome]) -> str:
    """Return one line per check, as Markdown."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    def mark(met: bool | None) -> str:
        return "" if met is None else " ✓" if met else " ✗"

    lines = ["| workload | unit | ours | against | | result | reach | aim |", "|---|---|---|---|---|---|---|---|"]
    for outcome in outcomes:
        check = outcome.check
        result = outcome.why_not or {"ratio": "× ", "difference": "+ ", "value": ""}[check.relation] + number(
            outcome.value
        )
        reach = check.limit_text(check.reach) + mark(outcome.reach_met)
        aim = check.limit_text(check.aim) + mark(outcome.aim_met)
        cells = (
            check.title,
            check.unit,
            number(outcome.ours),
            against(check),
            number(outcome.peer),
            result,
            reach,
            aim,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def document(
    comparison: Comparison, outcomes: Sequence[Outcome], facts: Mapping[str, Any], repeat: int
) -> dict[str, Any]:
    """Return all data needed to judge the table, or to draw it again."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.compare " + " ".join(sys.argv[1:]),
        "commit": commit.stdout.strip(),
        "machine": dict(facts),
        "repeat": repeat,
        "settings": comparison.settings,
        "checks": [outcome.as_json() for outcome in outcomes],
        "failures": comparison.record.failures,
        "results": comparison.record.as_json(),
    }


def demo_model() -> Path:
    made = subprocess.run(
        [sys.executable, "examples/demo_model.py"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
    )
    return Path(made.stdout.strip())


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure LoRAFleet against its targets and against what else is installed.",
        epilog="benchmarks/install_vllm.sh makes an environment for --vllm.",
    )
    parser.add_argument("--model", type=Path, help="model directory (default: the demo model)")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="the Python of an environment with vLLM")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--repeat", type=int, default=5, help="rounds; the table shows medians (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "build" / "benchmarks", help="(default: %(default)s)")
    args = parser.parse_args()
    # SIGTERM ends the program like Ctrl-C: by leaving the blocks that started processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    checks = [check for check in CHECKS if check.row in args.rows]
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorafleet-compare-")))
        model = args.model or demo_model()
        adapters = write_adapters(model, scratch / "adapters", count=NUM_ADAPTERS, lora_rank=LORA_RANK)
        vllm_python = args.vllm.absolute() if args.vllm else None  # not resolved: an environment's python is a link
        comparison = Comparison(Sides(model, adapters, scratch, vllm_python), checks, stack)
        comparison.start(with_transformers=not args.no_transformers)
        comparison.measure(args.repeat)
        facts = comparison.facts()
    outcomes = [comparison.record.outcome(check) for check in checks]
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{datetime.date.today()}-compare"
    content = document(comparison, outcomes, facts, args.repeat)
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(outcomes) + "\n")
    print(table(outcomes))
    reason = chart.missing()
    if reason is None:
        chart.draw(outcomes, facts, stem.with_suffix(".png"))
    else:
        print(reason, file=sys.stderr)
    print(f"written: {stem}.json, .md" + ("" if reason else ", .png"), file=sys.stderr)


if __name__ == "__main__":
    main()
