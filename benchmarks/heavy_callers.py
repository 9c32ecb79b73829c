"""Measures whether one tenant's heavy or hostile requests delay another's: each case of heavy_cases.py with a canary.

    python -m benchmarks.heavy_callers --model DIR [--case NAME ...] [--seconds 6] [--adapters 200] [--out FILE.json]

Starts `lorafleet serve` with two API keys. With one of them a canary (canary.py) streams and requests single tokens;
with the other the cases run in a separate process. Quiet and heavy intervals alternate; the longest wait of a heavy
one is compared with the median of the quiet ones.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import serving
from benchmarks.canary import Canary, Waits
from benchmarks.heavy_cases import CASES
from benchmarks.machine import facts
from benchmarks.peers import Server
from benchmarks.random_adapters import write_adapters

OURS, THEIRS = "canary-" + "a" * 32, "heavy-" + "b" * 32  # API keys; the server's first may load adapters
REACH = 3.0  # times the quiet wait


def server(args: argparse.Namespace, scratch: Path) -> Server:
    adapters = write_adapters(Path(args.model), scratch / "adapters", count=args.adapters, lora_rank=8)
    (scratch / "root").mkdir()
    next(iter(adapters.values())).rename(scratch / "root" / "good")
    adapters[next(iter(adapters))] = scratch / "root" / "good"
    command = [str(Path(sys.executable).parent / "lorafleet"), "serve", args.model, "--served-model-name", "base"]
    command += ["--api-key", THEIRS, OURS, "--num-threads", str(args.num_threads), "--enable-lora"]
    command += ["--allow-runtime-lora-updates", "--lora-root", str(scratch / "root"), "--lora-modules"]
    command += [f"{name}={path}" for name, path in adapters.items()]
    return Server(command, scratch / "server.log", "/ready")


async def beside(name: str, args: argparse.Namespace, url: str, canary: Canary, scratch: Path) -> dict[str, Any]:
    """Measure one case between two quiet intervals."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "benchmarks.heavy_cases", name, "--url", url, "--api-key", THEIRS, "--adapter", "random-000"),
        *("--root", str(scratch / "root"), "--seconds", str(args.seconds)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        preexec_fn=lambda: os.nice(args.nice),
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        assert (await child.stdout.readline()).strip() == b"ready"
        before = await _quiet(canary, args.seconds)
        child.stdin.write(b"go\n")
        answers = json.loads(await asyncio.wait_for(child.stdout.readline(), args.seconds + 30))
        heavy = canary.take()
        await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    after = await _quiet(canary, args.seconds)
    waits = {"before": before, "heavy": heavy, "after": after}
    return {"case": name, **{when: dataclasses.asdict(wait) for when, wait in waits.items()}, "answers": answers}


async def _quiet(canary: Canary, seconds: float) -> Waits:
    await asyncio.sleep(1.0)
    canary.take()
    await asyncio.sleep(seconds)
    return canary.take()


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row the ratio of its heavy wait to the run's quiet wait (the median of the quiet intervals)."""
    for wait in ("stream_gap_s", "request_s"):
        quiet = statistics.median(row[when][wait] for row in rows for when in ("before", "after"))
        for row in rows:
            row[f"{wait}_ratio"] = round(row["heavy"][wait] / quiet, 2)
    for row in rows:
        row["is_met"] = max(row["stream_gap_s_ratio"], row["request_s_ratio"]) <= REACH and not row["heavy"]["errors"]


async def measure(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    rows = []
    with server(args, scratch) as serves:
        async with serving.connect(serves.url, OURS) as session, Canary(session, "base").run() as canary:
            await asyncio.sleep(3.0)
            print(
                f"{'longest wait, ms':<28}{'stream: before, heavy, after':>30}{'request':>27}  answers", file=sys.stderr
            )
            for name in args.case:
                row = await beside(name, args, serves.url, canary, scratch)
                rows.append(row)
                waits = [row[when] for when in ("before", "heavy", "after")]
                gaps = "".join(f"{1e3 * wait['stream_gap_s']:>9.0f}" for wait in waits)
                requests = "".join(f"{1e3 * wait['request_s']:>9.0f}" for wait in waits)
                errors = "; ".join(error for wait in waits for error in wait["errors"])[:200]
                print(f"{name:<31}{gaps}{requests}  {row['answers']} {errors}", file=sys.stderr)
                serves.check()
    compare(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Heavy callers beside a canary.")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each interval")
    parser.add_argument("--adapters", type=int, default=200, help="adapters the server has")
    parser.add_argument("--num-threads", type=int, default=1, help="the engine's")
    parser.add_argument("--nice", type=int, default=10, help="niceness of the heavy caller's process")
    parser.add_argument("--out", type=Path, default=None, help="write JSON to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorafleet-bench-") as scratch:
        rows = asyncio.run(measure(args, Path(scratch)))
    for row in rows:
        met = "" if row["is_met"] else "  NOT MET"
        print(f"{row['case']:<28}{row['stream_gap_s_ratio']:>7}{row['request_s_ratio']:>7}{met}", file=sys.stderr)
    num_met = sum(row["is_met"] for row in rows)
    print(f"{num_met} of {len(rows)} within {REACH:g} times the run's quiet wait", file=sys.stderr)
    document = json.dumps({"machine": facts(), "rows": rows}, indent=2)
    if args.out is None:
        print(document)
    else:
        args.out.write_text(document + "\n")


if __name__ == "__main__":
    main()
