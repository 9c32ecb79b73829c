"""The GPU benchmark's report: one table, the targets, and a picture of the table."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

OFF, NONE, MIXED = "LoRA off", "none", "mixed"
MEASURED, SKIPPED, FAILED, MISSING = "measured", "skipped", "failed", "no time left"
LATENCY_SEQS = 1  # sequences of the decode steps with a latency target
LOADED_SEQS = 64
_LARGEST_COUNT = "32"  # distinct adapters, the largest with a target


@dataclass(frozen=True, slots=True)
class Case:
    """A step to measure."""

    kind: str  # decode or prefill
    num_seqs: int
    num_tokens: int  # decode: keys per sequence; prefill: tokens of all prompts
    adapters: str  # OFF, NONE, number of distinct ones of the same rank, or MIXED

    def title(self) -> str:
        return f"{self.kind} {self.num_seqs} × {self.num_tokens}"


@dataclass(frozen=True, slots=True)
class Row:
    """The result of a case. Times are of one step."""

    model: str
    case: Case
    status: str
    note: str = ""  # why it was not measured
    device_s: float = 0.0  # consecutive forward passes, by the device's clock, which may wait for the host
    step_s: float = 0.0  # wall clock of overlapping steps, with their preparation and sampling
    floor_s: float = 0.0
    bound: str = ""  # the resource that sets the floor: bytes or FLOPs
    num_bytes: int = 0
    flop: int = 0

    @property
    def ratio(self) -> float:
        return self.device_s / self.floor_s


@dataclass(frozen=True, slots=True)
class Target:
    """A limit for the worst of some rows."""

    title: str
    bound: float
    figure: Callable[[Row, Row | None], float]  # computed from a row and the one it is compared with
    of: Callable[[Case], bool]
    to: str | None = None  # adapters of the row compared with
    is_least: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    title: str
    worst: float | None  # None: no row was measured
    where: str
    is_met: bool
    num_missing: int  # rows not measured, without which it does not hold

    def line(self) -> str:
        if self.worst is None:
            return f"{self.title:<62}not measured"
        verdict = (
            "not met" if not self.is_met else f"met, {self.num_missing} not measured" if self.num_missing else "met"
        )
        return f"{self.title:<62}{self.worst:>8.3f}  {verdict}  ({self.where})"


def _ratio(row: Row, other: Row | None) -> float:
    return row.ratio


def _of_rate(row: Row, other: Row | None) -> float:
    return row.floor_s / row.device_s


def _to_other(row: Row, other: Row | None) -> float:
    assert other is not None
    return row.device_s / other.device_s


def _is_decode(case: Case, num_seqs: int, adapters: str) -> bool:
    return (case.kind, case.num_seqs, case.adapters) == ("decode", num_seqs, adapters)


TARGETS = (
    Target("decode, batch 1: time ÷ floor ≤ 1.25", 1.25, _ratio, lambda case: _is_decode(case, LATENCY_SEQS, NONE)),
    Target("decode, batch 64: time ÷ floor ≤ 1.4", 1.4, _ratio, lambda case: _is_decode(case, LOADED_SEQS, NONE)),
    Target(
        "decode, batch 64: one adapter ÷ none ≤ 1.05",
        1.05,
        _to_other,
        lambda case: _is_decode(case, LOADED_SEQS, "1"),
        NONE,
    ),
    Target(
        "decode, batch 64: 32 distinct adapters ÷ none ≤ 1.12",
        1.12,
        _to_other,
        lambda case: _is_decode(case, LOADED_SEQS, _LARGEST_COUNT),
        NONE,
    ),
    Target(
        "prefill: share of the matmul rate ≥ 0.6",
        0.6,
        _of_rate,
        lambda case: case.kind == "prefill" and case.adapters == NONE,
        is_least=True,
    ),
    Target(
        "prefill: with adapters ÷ without ≤ 1.1",
        1.1,
        _to_other,
        lambda case: case.kind == "prefill" and case.adapters not in (OFF, NONE),
        NONE,
    ),
    Target(
        "decode, base model alone: LoRA enabled ÷ off ≤ 1.01",
        1.01,
        _to_other,
        lambda case: case.kind == "decode" and case.adapters == NONE,
        OFF,
    ),
)


def judge(target: Target, rows: Sequence[Row]) -> Verdict:
    """Judge by the row farthest from the target. Rows without a partner are not compared."""
    figures: list[tuple[float, str]] = []
    num_missing = 0
    for row in rows:
        if not target.of(row.case):
            continue
        other = None if target.to is None else partner(row, rows, target.to)
        if target.to is not None and other is None:
            continue
        if row.status == MEASURED and (other is None or other.status == MEASURED):
            figures.append((target.figure(row, other), f"{row.model}, {row.case.title()}, {row.case.adapters}"))
        else:
            num_missing += 1
    if not figures:
        return Verdict(target.title, None, "", False, num_missing)
    worst, where = min(figures) if target.is_least else max(figures)
    is_met = worst >= target.bound if target.is_least else worst <= target.bound
    return Verdict(target.title, worst, where, is_met, num_missing)


def partner(row: Row, rows: Iterable[Row], adapters: str) -> Row | None:
    """Return the row of the same step with those adapters, whether or not it was measured."""
    case = Case(row.case.kind, row.case.num_seqs, row.case.num_tokens, adapters)
    return next((other for other in rows if other.model == row.model and other.case == case), None)


HEAD = (
    f"{'model':<12}{'step':<9}{'seqs':>5}{'tokens':>8}  {'adapters':<10}{'ms':>10}{'floor ms':>10}{'ratio':>7}  "
    f"{'bound':<7}{'to base':>8}{'whole ms':>10}{'tok/s':>10}"
)


def line(row: Row, rows: Sequence[Row]) -> str:
    case = row.case
    start = f"{row.model:<12}{case.kind:<9}{case.num_seqs:>5}{case.num_tokens:>8}  {case.adapters:<10}"
    if row.status != MEASURED:
        return f"{start}  {row.status}{row.note and f': {row.note}'}"
    base = None if case.adapters in (OFF, NONE) else partner(row, rows, NONE)
    change = ""
    if base is not None and base.status == MEASURED:
        change = f"{100 * (row.device_s / base.device_s - 1):+.1f} %"
    tokens = case.num_tokens if case.kind == "prefill" else case.num_seqs
    return (
        f"{start}{1e3 * row.device_s:>10.3f}{1e3 * row.floor_s:>10.3f}{row.ratio:>7.2f}  {row.bound:<7}{change:>8}"
        f"{1e3 * row.step_s:>10.3f}{tokens / row.step_s:>10,.0f}"
    )


def no_picture() -> str | None:
    """Return why no picture can be drawn, or an empty string."""
    if importlib.util.find_spec("matplotlib"):
        return None
    return "no picture: matplotlib is not installed; where it is, `python -m benchmarks.gpu --draw FILE.json` draws one"


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw each measured step's time over its floor, in a panel for each model. Call `no_picture` first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row.status == MEASURED]
    models = list(dict.fromkeys(row.model for row in measured))
    if not models:
        return
    height = 1.6 + 0.19 * max(sum(row.model == model for row in measured) for model in models)
    figure, axes = pyplot.subplots(1, len(models), figsize=(6.4 * len(models), height), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        own = [row for row in measured if row.model == model]
        colours = ["#2563eb" if row.case.kind == "decode" else "#f59e0b" for row in own]
        bars = axis.barh(range(len(own)), [row.ratio for row in own], color=colours)
        axis.bar_label(bars, [f"{row.ratio:.2f}  ({1e3 * row.device_s:.3g} ms)" for row in own], fontsize=6, padding=2)
        axis.set_yticks(range(len(own)), [f"{row.case.title()}, {row.case.adapters}" for row in own], fontsize=6)
        axis.axvline(1.0, color="#9ca3af", linewidth=1)
        axis.margins(x=0.2, y=0.01)
        axis.invert_yaxis()
        axis.set_title(f"{model}: time ÷ floor, less is better", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
