"""The effect of a busy machine on streams: tokens a second and the longest gap, alone and with neighbours.

python -m benchmarks.neighbours [--seconds 2] [--repeat 3] [--scene NAME ...] [--out FILE.json]

A scene is a subject that generates, and neighbours that start and stop. It is measured between two quiet measurements
of the same subject, and compared with their mean, since the machine's speed drifts. With k busy threads on c cores, a
subject's fair share of its quiet speed is c / (c + k); the target is two thirds of that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks import machine
from benchmarks.compare import demo_model
from benchmarks.peers import Child

NUM_STREAMS = 4
REACH = 0.675  # target share of the fair share: 0.45 of the quiet speed with one busy thread on two cores
Figures = dict[str, float]  # tok_per_s, longest_gap_ms


class Subject(Protocol):
    """The program measured."""

    def measure(self, seconds: float) -> Figures: ...


Neighbours = Callable[[], contextlib.AbstractContextManager[Figures]]  # may fill in their own figures at the end


@dataclass(frozen=True, slots=True)
class Scene:
    """A subject and its neighbours."""

    name: str
    subject: Subject
    neighbours: Neighbours
    num_busy: int  # the neighbours' threads that compete for the cores

    def reach(self, num_cores: int) -> float:
        """Return the target ratio."""
        return REACH * num_cores / (num_cores + self.num_busy)


class EngineStreams:
    """Streams of an engine in a separate process."""

    def __init__(self, model: Path, log: Path, *, workers_per_host: int = 1) -> None:
        self._child = Child("streams_child", str(model), str(workers_per_host), log=log)

    def __enter__(self) -> EngineStreams:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    @property
    def num_threads(self) -> int:
        return int(self._child.call("facts")["num_threads"])

    def measure(self, seconds: float) -> Figures:
        self._child.call("begin", num_streams=NUM_STREAMS)
        time.sleep(seconds)
        figures: Figures = self._child.call("end")
        return figures

    @contextlib.contextmanager
    def generating(self) -> Iterator[Figures]:
        """Generate as a neighbour."""
        figures: Figures = {}
        self._child.call("begin", num_streams=NUM_STREAMS)
        try:
            yield figures
        finally:
            figures.update(self._child.call("end"))


def spinning(count: int, nice: int = 0) -> Neighbours:
    """Run processes that compute without end."""

    @contextlib.contextmanager
    def run() -> Iterator[Figures]:
        command = [sys.executable, "-c", f"import os\nos.nice({nice})\nwhile True: pass"]
        processes = [subprocess.Popen(command) for _ in range(count)]
        try:
            time.sleep(0.3)  # until they have started
            yield {}
        finally:
            for process in processes:
                process.kill()
                process.wait()

    return run


@contextlib.contextmanager
def make_scenes(model: Path, scratch: Path) -> Iterator[list[Scene]]:
    """Return all scenes, with the subjects they need."""
    with contextlib.ExitStack() as stack:

        def engine(name: str, **options: int) -> EngineStreams:
            return stack.enter_context(EngineStreams(model, scratch / f"{name}.log", **options))

        first, second = engine("first"), engine("second")
        worker0, worker1 = engine("worker0", workers_per_host=2), engine("worker1", workers_per_host=2)
        yield [
            Scene("1 spinning process", first, spinning(1), 1),
            Scene("2 spinning processes", first, spinning(2), 2),
            Scene("1 spinning at nice 19", first, spinning(1, nice=19), 1),
            Scene("a second engine", first, second.generating, second.num_threads),
            Scene("the host's other worker", worker0, worker1.generating, worker1.num_threads),
        ]


def measure(scene: Scene, seconds: float) -> dict[str, Any]:
    """Measure a scene between two quiet measurements of its subject."""
    before = scene.subject.measure(seconds)
    with scene.neighbours() as neighbours:
        beside = scene.subject.measure(seconds)
    after = scene.subject.measure(seconds)
    quiet = (before["tok_per_s"] + after["tok_per_s"]) / 2
    return {
        "scene": scene.name,
        "before": before,
        "beside": beside,
        "after": after,
        "neighbours": neighbours,
        "ratio": round(beside["tok_per_s"] / quiet, 3),
    }


def summarise(scene: Scene, rows: list[dict[str, Any]], num_cores: int) -> dict[str, Any]:
    """Return a scene's medians, and its longest gaps."""
    own = [row for row in rows if row["scene"] == scene.name]
    quiet = [row[when] for row in own for when in ("before", "after")]
    beside = [row["beside"] for row in own]
    ratio = statistics.median(row["ratio"] for row in own)
    return {
        "scene": scene.name,
        "quiet_tok_per_s": round(statistics.median(figures["tok_per_s"] for figures in quiet), 1),
        "beside_tok_per_s": round(statistics.median(figures["tok_per_s"] for figures in beside), 1),
        "ratio": round(ratio, 3),
        "ratios": [row["ratio"] for row in own],
        "reach": round(scene.reach(num_cores), 3),
        "is_reached": ratio >= scene.reach(num_cores),
        "quiet_longest_gap_ms": max(figures["longest_gap_ms"] for figures in quiet),
        "beside_longest_gap_ms": max(figures["longest_gap_ms"] for figures in beside),
    }


def print_table(summaries: list[dict[str, Any]]) -> None:
    head = ("quiet tok/s", "beside", "ratio", "reach", "longest gap quiet", "beside, ms")
    print(
        f"{f'{NUM_STREAMS} streams, beside':<26}" + "".join(f"{text:>{len(text) + 3}}" for text in head),
        file=sys.stderr,
    )
    for row in summaries:
        figures = [row[f"{when}_tok_per_s"] for when in ("quiet", "beside")] + [row["ratio"], row["reach"]]
        figures += [row[f"{when}_longest_gap_ms"] for when in ("quiet", "beside")]
        line = "".join(f"{figure:>{len(text) + 3}}" for figure, text in zip(figures, head, strict=True))
        print(f"{row['scene']:<26}{line}{'' if row['is_reached'] else '  NOT REACHED'}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure streams beside busy neighbours.")
    parser.add_argument("--model", type=Path, help="model directory (default: the demo model)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement")
    parser.add_argument("--repeat", type=int, default=3, help="rounds over all scenes")
    parser.add_argument(
        "--scene", nargs="+", metavar="NAME", help="words in the names of the scenes to measure (default: all)"
    )
    parser.add_argument("--out", type=Path, help="file for the JSON (default: stdout)")
    args = parser.parse_args()
    num_cores = len(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    model = args.model or demo_model()
    with tempfile.TemporaryDirectory(prefix="lorafleet-bench-") as scratch, make_scenes(model, Path(scratch)) as scenes:
        chosen = [scene for scene in scenes if not args.scene or any(word in scene.name for word in args.scene)]
        if not chosen:
            parser.error(f"--scene names none of: {', '.join(scene.name for scene in scenes)}.")
        for scene in chosen:
            scene.subject.measure(0.3)  # warm-up
        for _ in range(args.repeat):
            rows += [measure(scene, args.seconds) for scene in chosen]
    summaries = [summarise(scene, rows, num_cores) for scene in chosen]
    print_table(summaries)
    document = json.dumps({"machine": machine.facts(), "scenes": summaries, "rounds": rows}, indent=2)
    if args.out is None:
        print(document)
    else:
        args.out.write_text(document + "\n")


if __name__ == "__main__":
    main()
