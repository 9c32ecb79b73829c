"""The GPU benchmark runs end to end on a tiny model in Triton's interpreter, and judges by the worst row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks are run from the repository, never installed

from benchmarks.gpu import FULL, TINY
from benchmarks.gpu_report import FAILED, MEASURED, NONE, OFF, SKIPPED, TARGETS, Case, Row, Verdict, judge, line

ROOT = Path(__file__).parents[2]
DRY_RUN = """
import sys
from benchmarks import gpu
status = gpu.main(["--device", "cpu", "--quick", "--out", sys.argv[1]])
loaded = {"ray", "grpc", "aiohttp"} & set(sys.modules)
sys.exit(f"loaded: {loaded}" if loaded else status)
"""


def test_a_dry_run_measures_every_row_and_loads_neither_ray_nor_grpc_nor_http(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUN, str(out)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "no figure above is from a GPU" in done.stdout
    assert done.stdout.count("not measured") == len(TARGETS)
    content = json.loads(out.read_text())
    assert content["is_dry_run"] and content["checks"] and all(check["is_met"] for check in content["checks"])
    rows = [Row(**row | {"case": Case(**row["case"])}) for row in content["rows"]]
    assert [row.case for row in rows] == [*TINY.off(), *TINY.uniform(), *TINY.mixed()]
    assert {row.status for row in rows} == {MEASURED}
    for row in rows:
        assert min(row.device_s, row.step_s, row.floor_s, row.num_bytes, row.flop) > 0
        assert line(row, rows) in done.stdout


def test_without_the_interpreter_a_dry_run_says_what_it_needs() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "TRITON_INTERPRET=1" in done.stderr


def test_the_full_grid_has_the_rows_that_targets_are_about() -> None:
    cases = [*FULL.off(), *FULL.uniform(), *FULL.mixed()]
    assert len(set(cases)) == len(cases)
    for target in TARGETS:
        own = [case for case in cases if target.of(case)]
        assert own, target.title
        if target.to is not None:
            assert any(Case(case.kind, case.num_seqs, case.num_tokens, target.to) in cases for case in own)


def row(adapters: str, ms: float, context: int = 512, status: str = MEASURED) -> Row:
    return Row("m", Case("decode", 64, context, adapters), status, "", ms / 1e3, ms / 1e3, 10e-3, "bytes", 1, 1)


@pytest.mark.parametrize(
    ("rows", "target", "expected"),
    [
        ([row(NONE, 13.0), row(NONE, 12.0, 4096)], 1, (1.3, True, 0)),
        ([row(NONE, 13.0), row(NONE, 15.0, 4096)], 1, (1.5, False, 0)),
        ([row(NONE, 13.0), row(NONE, 0.0, 4096, SKIPPED)], 1, (1.3, True, 1)),
        ([row(NONE, 10.0), row("32", 11.0)], 3, (1.1, True, 0)),
        ([row(NONE, 10.0), row("32", 11.3)], 3, (1.13, False, 0)),
        ([row(NONE, 0.0, status=FAILED), row("32", 11.0)], 3, (None, False, 1)),
        ([row(OFF, 10.0), row(NONE, 10.05), row(NONE, 20.0, 4096)], 6, (1.005, True, 0)),
        ([], 0, (None, False, 0)),
    ],
)
def test_targets_are_judged_by_the_worst_row(
    rows: list[Row], target: int, expected: tuple[float | None, bool, int]
) -> None:
    verdict: Verdict = judge(TARGETS[target], rows)
    worst, is_met, num_missing = expected
    assert verdict.worst == (None if worst is None else pytest.approx(worst))
    assert (verdict.is_met, verdict.num_missing) == (is_met, num_missing)
