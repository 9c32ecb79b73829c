"""The measurements by round, and the outcome of each check. Knows no process and no clock."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.targets import Check, Figure


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check's medians. `value` is the median of the rounds' ratios, so that a drift of the machine cancels out."""

    check: Check
    ours: float | None
    peer: float | None
    value: float | None
    values: tuple[float, ...]  # one per round
    reach_met: bool | None
    aim_met: bool | None
    why_not: str  # why there is no value; empty if there is one

    def as_json(self) -> dict[str, Any]:
        check = self.check
        return {
            "row": check.row,
            "title": check.title,
            "unit": check.unit,
            "against": against(check),
            "ours": self.ours,
            "peer": self.peer,
            "relation": check.relation,
            "value": self.value,
            "values": self.values,
            "reach": check.limit_text(check.reach),
            "reach_met": self.reach_met,
            "aim": check.limit_text(check.aim),
            "aim_met": self.aim_met,
            "why_not": self.why_not,
        }


def against(check: Check) -> str:
    return "" if check.peer is None else check.peer.label or check.peer.side


@dataclass(slots=True)
class Record:
    """Results and failures by (side, workload)."""

    results: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = field(default_factory=dict)  # by round
    failures: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_json(cls, results: Iterable[Mapping[str, Any]]) -> Record:
        """Return the record of `as_json`'s document, without the failures."""
        record = cls()
        for result in results:
            record.add(result["side"], result["workload"], result["round"], result)
        return record

    def add(self, side: str, workload: str, number: int, result: Mapping[str, Any]) -> None:
        self.results.setdefault((side, workload), {})[number] = result

    def fail(self, side: str, workload: str | None, number: int | None, error: str) -> None:
        """Note a failure. workload None: all of the side's."""
        self.failures.append({"side": side, "workload": workload, "round": number, "error": error})

    def values(self, figure: Figure) -> dict[int, float]:
        """Return a figure by round; a list of samples counts as its median."""
        values = {}
        for number, result in self.results.get((figure.side, figure.workload), {}).items():
            found: Any = result
            for key in figure.metric.split("."):
                found = found[key]
            values[number] = float(statistics.median(found) if isinstance(found, list) else found)
        return values

    def outcome(self, check: Check) -> Outcome:
        ours = self.values(check.ours)
        peer = {} if check.peer is None else self.values(check.peer)
        rounds = sorted(ours if check.peer is None else ours.keys() & peer.keys())
        values = tuple(check.value(ours[number], peer.get(number)) for number in rounds)
        value = _median(values)
        return Outcome(
            check,
            _median(list(ours.values())),
            _median(list(peer.values())),
            value,
            values,
            None if value is None else check.is_met(value, check.reach),
            None if value is None else check.is_met(value, check.aim),
            "" if values else self._why_not(check),
        )

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"side": side, "round": number, "workload": workload, **result}
            for (side, workload), results in self.results.items()
            for number, result in results.items()
        ]

    def _why_not(self, check: Check) -> str:
        for figure in reversed(check.figures):
            if not self.values(figure):
                for failure in self.failures:
                    if failure["side"] == figure.side and failure["workload"] in (None, figure.workload):
                        return f"{figure.side}: {failure['error']}"
        return "not run"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
