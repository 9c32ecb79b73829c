"""The comparison of streams measured alone and with neighbours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from benchmarks.neighbours import Figures, Scene, measure, summarise


class Played:
    """A subject whose figures are given, one per measurement; it notes which neighbours ran."""

    def __init__(self, *tok_per_s: float) -> None:
        self._figures = [{"tok_per_s": own, "longest_gap_ms": 1e3 / own} for own in tok_per_s]
        self.present = False
        self.seen: list[bool] = []

    def measure(self, seconds: float) -> Figures:
        self.seen.append(self.present)
        return self._figures.pop(0)

    @contextlib.contextmanager
    def neighbours(self) -> Iterator[Figures]:
        self.present = True
        figures: Figures = {}
        yield figures
        figures["tok_per_s"] = 7.0
        self.present = False


@pytest.mark.parametrize(
    ("num_cores", "num_busy", "reach"), [(2, 1, 0.45), (2, 2, 0.3375), (8, 1, 0.6), (8, 8, 0.3375), (1, 1, 0.3375)]
)
def test_two_thirds_of_the_fair_part_of_the_cores_are_to_be_reached(
    num_cores: int, num_busy: int, reach: float
) -> None:
    subject = Played()
    assert Scene("", subject, subject.neighbours, num_busy).reach(num_cores) == pytest.approx(reach)


def test_a_scene_is_compared_with_the_quiet_before_and_after_it() -> None:
    subject = Played(100.0, 40.0, 60.0, 200.0, 50.0, 200.0)
    scene = Scene("noise", subject, subject.neighbours, 1)
    rows = [measure(scene, 1.0) for _ in range(2)]
    assert subject.seen == [False, True, False] * 2
    assert [row["ratio"] for row in rows] == [0.5, 0.25]
    assert rows[0]["neighbours"] == {"tok_per_s": 7.0}
    other = {**rows[0], "scene": "another"}
    assert summarise(scene, [*rows, other], num_cores=2) == {
        "scene": "noise",
        "quiet_tok_per_s": 150.0,
        "beside_tok_per_s": 45.0,
        "ratio": 0.375,
        "ratios": [0.5, 0.25],
        "reach": 0.45,
        "is_reached": False,
        "quiet_longest_gap_ms": pytest.approx(1e3 / 60),
        "beside_longest_gap_ms": pytest.approx(25.0),
    }
