"""Draws a comparison: a bar for each side's figure.

python -m benchmarks.chart FILE.json draws FILE.png from the file of an earlier run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import Outcome, Record
from benchmarks.targets import CHECKS

_COLOURS = {"ours": "#2563eb", "engine": "#2563eb", "vllm": "#f59e0b", "transformers": "#9ca3af", "bound": "#d1d5db"}
_NAMES = {"ours": "LoRAFleet", "engine": "LoRAFleet", "vllm": "vLLM", "transformers": "transformers", "bound": "bound"}
_PANELS = (  # (title, rows of the table, how to shorten a line's title)
    ("output, 32 requests (tok/s)\nmore is better", ("base", "adapters"), "32 requests, "),
    ("single stream (ms a token)\nless is better", ("single",), "single stream, "),
    ("1,500-token prompts (tok/s)\nmore is better", ("long",), "1,500-token prompts, "),
    ("first token (ms)\nless is better", ("first-token",), "first token, adapter "),
)


def missing() -> str | None:
    """Return why no picture can be drawn, or an empty string."""
    if importlib.util.find_spec("matplotlib"):
        return None
    return "no chart: matplotlib is not installed; `pip install matplotlib` and `python -m benchmarks.chart FILE.json`"


def bars(outcomes: Sequence[Outcome], rows: Sequence[str], prefix: str) -> dict[str, dict[str, float]]:
    """Return figures by group and side. Sides that bound us (matmul rate, reading of weights) share a colour."""
    groups: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        check = outcome.check
        if check.row not in rows:
            continue
        own_base = check.peer is not None and check.peer.label == "base"
        if own_base and outcome.peer is not None:
            groups.setdefault("base", {})[check.ours.side] = outcome.peer
        sides = groups.setdefault(check.title.removeprefix(prefix), {})
        if outcome.ours is not None:
            sides[check.ours.side] = outcome.ours
        if outcome.peer is None or check.peer is None or own_base or "our base" in check.peer.label:
            continue
        sides["bound" if check.peer.label else check.peer.side] = outcome.peer
    return {name: sides for name, sides in groups.items() if sides}


def draw(outcomes: Sequence[Outcome], facts: Mapping[str, Any], path: Path) -> None:
    """Write a PNG, under a title that names the machine. Call `missing` first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [(name, groups) for name, rows, prefix in _PANELS if (groups := bars(outcomes, rows, prefix))]
    if not drawn:
        return
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(4.2 * len(drawn), 4.4), squeeze=False)
    handles: dict[str, Any] = {}  # the bars of each side
    for axis, (name, groups) in zip(axes[0], drawn, strict=True):
        sides = [side for side in _COLOURS if any(side in values for values in groups.values())]
        width = 0.8 / len(sides)
        for number, values in enumerate(groups.values()):
            present = [side for side in sides if side in values]
            for place, side in enumerate(present):
                x = number + (place - (len(present) - 1) / 2) * width
                bar = axis.bar(x, values[side], width, color=_COLOURS[side])
                axis.bar_label(bar, fmt="{:,.0f}" if values[side] >= 100 else "{:.3g}", fontsize=7, padding=1)
                handles.setdefault(_NAMES[side], bar)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(groups)), groups, fontsize=8, rotation=20, ha="right")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"{facts.get('cpu', '')}, {facts.get('cores', '?')} cores", fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a comparison that an earlier run wrote.")
    parser.add_argument("file", type=Path, help="the run's JSON; the picture is written next to it")
    args = parser.parse_args()
    reason = missing()
    if reason is not None:
        sys.exit(reason)
    content = json.loads(args.file.read_text())
    record = Record.from_json(content["results"])
    draw([record.outcome(check) for check in CHECKS], content["machine"], args.file.with_suffix(".png"))


if __name__ == "__main__":
    main()
