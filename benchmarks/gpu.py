"""The engine's executing half on one GPU: compares each step with the floor of the device's memory and products.

    python -m benchmarks.gpu [--models llama-2-7b llama-3-8b] [--out FILE.json] [--quick]
    python -m benchmarks.gpu --draw FILE.json

Checks every kernel against its reference, measures the device's own copies and products, then decode steps and prompts
of models with random weights. The floors are from the same run. It ends within nine minutes and lists what it had no
time for. Needs torch, triton, transformers, safetensors and numpy, but not Ray, gRPC or HTTP.

`--device cpu`, with TRITON_INTERPRET=1, is a dry run on a tiny model, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_checks import Check, run_checks
from benchmarks.gpu_clock import Clock, copy_bytes_per_s, matmul_flop_per_s
from benchmarks.gpu_model import BenchModel, Limits, spec_of
from benchmarks.gpu_report import (
    FAILED,
    HEAD,
    LATENCY_SEQS,
    LOADED_SEQS,
    MEASURED,
    MISSING,
    MIXED,
    NONE,
    OFF,
    SKIPPED,
    TARGETS,
    Case,
    Row,
    draw,
    judge,
    line,
    no_picture,
)
from benchmarks.machine import facts
from lorafleet.kernels.dispatch import forced
from lorafleet.workers.model.memory_plan import format_bytes
from lorafleet.workers.scheduling.batch import StepPlan

_BUDGET_S = 510.0  # no row begins after this
_MODELS = ("llama-2-7b", "llama-3-8b")


@dataclass(frozen=True, slots=True)
class Grid:
    """The rows measured of a model."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]  # tokens of all prompts of a step
    counts: tuple[int, ...]  # numbers of distinct adapters
    rank: int
    mixed_ranks: tuple[int, ...]  # of adapters in turn
    off_batches: tuple[int, ...]  # also measured without LoRA, at the first context

    def off(self) -> list[Case]:
        return [Case("decode", batch, self.contexts[0], OFF) for batch in self.off_batches]

    def uniform(self) -> list[Case]:
        """Return steps, in an order in which those compared with each other are adjacent."""
        cases = []
        for number, context in enumerate(self.contexts):
            for batch in self.batches:
                adapters = [NONE, *(str(count) for count in self.counts if count <= batch)]
                cases += [Case("decode", batch, context, name) for name in adapters]
            if number == 0:
                for tokens in self.prompts:
                    cases += [Case("prefill", n, tokens, name) for n in self.counts for name in (NONE, str(n))]
        return cases

    def mixed(self) -> list[Case]:
        cases = [Case("decode", b, context, MIXED) for context in self.contexts for b in self.batches if b > 1]
        return cases + [Case("prefill", self.counts[-1], tokens, MIXED) for tokens in self.prompts]


FULL = Grid(
    (1, 8, 32, 64, 128), (512, 4096), (2048, 8192), (1, 8, 32), 16, (8, 16, 32, 64), (LATENCY_SEQS, LOADED_SEQS)
)
QUICK = Grid((1, 64), (512,), (2048,), (1, 32), 16, (8, 16, 32, 64), (LATENCY_SEQS, LOADED_SEQS))
TINY = Grid((1, 3), (16, 40), (12,), (1, 3), 2, (1, 2, 4), (1, 3))


@dataclass
class Bench:
    """One run: the facts about the device, and the rows so far."""

    device: torch.device
    grid: Grid
    clock: Clock
    began: float
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    copy_bytes_per_s: float = 0.0
    matmul_flop_per_s: float = 0.0

    def check(self) -> None:
        print("\nkernels against their references", flush=True)
        print(f"{'kernel':<40}{'dtype':<10}{'error':>10}{'limit':>10}")
        for check in run_checks(self.device):
            self.checks.append(check)
            print(check.line(), flush=True)
        self._free()

    def measure_device(self) -> None:
        self.copy_bytes_per_s = copy_bytes_per_s(self.clock)
        self.matmul_flop_per_s = matmul_flop_per_s(self.clock)
        self._free()
        print(
            f"\ncopies move {self.copy_bytes_per_s / 1e9:,.0f} GB/s (read and written), products do "
            f"{self.matmul_flop_per_s / 1e12:,.1f} TFLOP/s in bfloat16"
        )

    def measure_model(self, name: str, deadline: float) -> None:
        """Measure all rows of a model; failures become rows too."""
        grid = self.grid
        max_tokens = max(*grid.prompts, *grid.batches)
        num_off_tokens = max(grid.off_batches) * grid.contexts[0]
        off = Limits(max(grid.off_batches), max(grid.off_batches), 0, 1, num_off_tokens)
        self._measure(name, off, [((), grid.off())], deadline)
        most = grid.counts[-1]
        limits = Limits(max(grid.batches), max_tokens, most, max(grid.rank, *grid.mixed_ranks))
        mixed = tuple(grid.mixed_ranks[slot % len(grid.mixed_ranks)] for slot in range(most))
        self._measure(name, limits, [((grid.rank,) * most, grid.uniform()), (mixed, grid.mixed())], deadline)

    def results(self) -> dict[str, Any]:
        machine = facts() | {"device": device_name(self.device), "cuda": torch.version.cuda}
        with suppress(ImportError):
            import triton

            machine["triton"] = triton.__version__
        return {
            "machine": machine,
            "is_dry_run": self.device.type != "cuda",
            "took_s": time.monotonic() - self.began,
            "copy_bytes_per_s": self.copy_bytes_per_s,
            "matmul_flop_per_s": self.matmul_flop_per_s,
            "checks": [check.as_json() for check in self.checks],
            "rows": [asdict(row) for row in self.rows],
            "targets": [asdict(judge(target, self.rows)) for target in TARGETS],
        }

    def _measure(
        self, name: str, limits: Limits, parts: Sequence[tuple[Sequence[int], list[Case]]], deadline: float
    ) -> None:
        """parts: ranks of the adapters in the slots, and the cases measured with them."""
        waiting = [(ranks, case) for ranks, cases in parts for case in cases]
        model: BenchModel | None = None
        try:
            if time.monotonic() < deadline:
                model = BenchModel(spec_of(name), limits, self.device)
                filled: Sequence[int] = ()
                while waiting and time.monotonic() < deadline:
                    ranks, case = waiting[0]
                    if ranks != filled:
                        model.fill_slots(ranks)
                        filled = ranks
                    del waiting[0]
                    self._add(self._row(name, model, case))
            rest = MISSING, ""
        except Exception as error:  # other models may work
            rest = FAILED, _why(error)
        for _, case in waiting:
            self._add(Row(name, case, *rest))
        model = None  # so that its memory can be freed
        self._free()

    def _row(self, name: str, model: BenchModel, case: Case) -> Row:
        is_decode = case.kind == "decode"
        tokens_each = case.num_tokens if is_decode else case.num_tokens // case.num_seqs
        if not model.fits(case.num_seqs, tokens_each):
            needed, room = model.kv_bytes(case.num_seqs, tokens_each), model.plan.kv_bytes
            note = f"its keys and values take {format_bytes(needed)}, there is room for {format_bytes(room)}"
            return Row(name, case, SKIPPED, note)
        try:
            make = model.decode_plan if is_decode else model.prefill_plan
            plan = make(case.num_seqs, tokens_each, self._num_adapters(case))
            work = model.work(plan)
            device_s = self.clock.median_s(lambda: model.runner.logits(plan))
            step_s = self._whole_step_s(model, plan, device_s, is_decode=is_decode)
        except Exception as error:  # other rows may work
            return Row(name, case, FAILED, _why(error))
        bytes_s, flop_s = work.num_bytes / self.copy_bytes_per_s, work.flop / self.matmul_flop_per_s
        bound = "bytes" if bytes_s > flop_s else "FLOPs"
        floor_s = max(bytes_s, flop_s)
        return Row(name, case, MEASURED, "", device_s, step_s, floor_s, bound, work.num_bytes, work.flop)

    def _num_adapters(self, case: Case) -> int:
        if case.adapters in (OFF, NONE):
            return 0
        return min(case.num_seqs, self.grid.counts[-1]) if case.adapters == MIXED else int(case.adapters)

    def _whole_step_s(self, model: BenchModel, plan: StepPlan, device_s: float, *, is_decode: bool) -> float:
        """Return wall-clock seconds of a step, launched as in the engine before the previous one returns its tokens."""
        count, num_samples = 2, 1
        if self.device.type == "cuda":
            count, num_samples = max(4, min(100, round(0.1 / device_s))), 3
        runner, requests = model.runner, [entry.request for entry in plan.scheduled]
        times = []
        try:
            for _ in range(num_samples):
                began = time.perf_counter()
                before = runner.launch(plan).samples
                for request in requests:
                    request.num_pending_tokens = int(is_decode)  # the input is the token that launch samples
                for _ in range(count - 1):
                    after = runner.launch(plan).samples
                    before.results()
                    before = after
                before.results()
                times.append((time.perf_counter() - began) / count)
        finally:
            for request in requests:
                request.num_pending_tokens = 0
        return statistics.median(times)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(line(row, self.rows), flush=True)

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # after a device error nothing works
                torch.cuda.synchronize(self.device)
            with suppress(RuntimeError):
                torch.cuda.empty_cache()


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "none: a dry run in Triton's interpreter"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.multi_processor_count} SMs, {format_bytes(properties.total_memory)}"


def run(models: Sequence[str], device: torch.device, grid: Grid, out: Path) -> bool:
    """Measure, print and write. Return whether all kernels agree with their references and no row failed."""
    began = time.monotonic()
    bench = Bench(device, grid, Clock(device), began)
    print(f"device: {device_name(device)}; torch {torch.__version__}")
    bench.check()
    bench.measure_device()
    print(f"\n{HEAD}", flush=True)
    for number, name in enumerate(models):
        now = time.monotonic()
        bench.measure_model(name, now + (began + _BUDGET_S - now) / (len(models) - number))
        _write(bench.results(), out)
    wrong = [check.kernel for check in bench.checks if not check.is_met]
    failed = sum(row.status == FAILED for row in bench.rows)
    missing = sum(row.status == MISSING for row in bench.rows)
    print(f"\ntargets on an H200, {'not judged in a dry run' if device.type != 'cuda' else 'worst rows'}")
    for target in TARGETS:
        print(judge(target, bench.rows).line() if device.type == "cuda" else f"{target.title:<62}not measured")
    if device.type != "cuda":
        print("\nThis was a dry run in Triton's interpreter: no figure above is from a GPU.")
    print(
        f"\n{len(bench.rows)} rows, {failed} failed, {missing} without time; {len(wrong)} kernels wrong"
        f"{': ' if wrong else ''}{', '.join(wrong)}; {time.monotonic() - began:.0f} s"
    )
    print(f"written: {out}")
    _picture(out)
    return not wrong and not failed


def _write(results: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


def _picture(file: Path) -> None:
    reason = no_picture()
    if reason is not None:
        print(reason)
        return
    content = json.loads(file.read_text())
    rows = [Row(**row | {"case": Case(**row["case"])}) for row in content["rows"]]
    machine = content["machine"]
    draw(rows, f"{machine['device']}, torch {machine['torch']}", file.with_suffix(".png"))
    print(f"written: {file.with_suffix('.png')}")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here. `--device cpu`, with TRITON_INTERPRET=1, makes a dry run.")
    if name == "cpu":
        import triton

        if not triton.knobs.runtime.interpret:
            sys.exit("A dry run needs TRITON_INTERPRET=1 in the environment.")
    return torch.device(name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the engine's steps on one GPU against what bounds them.")
    parser.add_argument("--models", nargs="+", choices=_MODELS, default=list(_MODELS))
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/gpu.json"), help="with a PNG next to it")
    parser.add_argument("--quick", action="store_true", help="few rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run of a tiny model")
    parser.add_argument("--draw", type=Path, metavar="FILE.json", help="only draw an earlier run's file")
    args = parser.parse_args(arguments)
    if args.draw is not None:
        _picture(args.draw)
        return 0
    device = _device(args.device)
    torch.manual_seed(0)
    with ExitStack() as stack:
        models, grid = args.models, QUICK if args.quick else FULL
        if device.type == "cpu":
            stack.enter_context(forced("triton"))
            models, grid = ["tiny"], TINY
        return 0 if run(models, device, grid, args.out) else 1


if __name__ == "__main__":
    sys.exit(main())
