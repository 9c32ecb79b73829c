"""The comparison's arithmetic: when a target counts as reached, and a line without a value."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks are run from the repository, never installed

from benchmarks.record import Record
from benchmarks.targets import CHECKS, COMPARED, Check, Figure
from benchmarks.workloads import Workload, make_requests

RATIO = Check(
    "row", "title", "tok/s", Figure("ours", "w", "speed"), Figure("vllm", "w", "speed"), "ratio", False, 2.0, 3.0
)


def test_the_value_is_the_median_of_the_rounds_own_ratios() -> None:
    record = Record()
    for number, (ours, theirs) in enumerate([(100.0, 50.0), (300.0, 100.0), (40.0, 10.0)]):  # the machine drifts
        record.add("ours", "w", number, {"speed": ours})
        record.add("vllm", "w", number, {"speed": theirs})
    outcome = record.outcome(RATIO)
    assert (outcome.value, outcome.values) == (3.0, (2.0, 3.0, 4.0))
    assert (outcome.ours, outcome.peer) == (100.0, 50.0)
    assert (outcome.reach_met, outcome.aim_met) == (True, True)


def test_rounds_that_one_side_lacks_do_not_count() -> None:
    record = Record()
    record.add("ours", "w", 0, {"speed": 10.0})
    record.add("ours", "w", 1, {"speed": 10.0})
    record.add("vllm", "w", 1, {"speed": 8.0})
    outcome = record.outcome(RATIO)
    assert outcome.values == (1.25,)
    assert (outcome.reach_met, outcome.aim_met) == (False, False)


def test_a_side_that_failed_says_why_and_meets_nothing() -> None:
    record = Record()
    record.add("ours", "w", 0, {"speed": 10.0})
    record.fail("vllm", None, None, "it did not start")
    outcome = record.outcome(RATIO)
    assert outcome.why_not == "vllm: it did not start"
    assert (outcome.value, outcome.reach_met, outcome.aim_met) == (None, None, None)


def test_a_list_of_samples_counts_as_its_median_and_keys_reach_below_keys() -> None:
    record = Record()
    record.add("ours", "w", 0, {"ttft_ms": {"p50": [1.0, 9.0, 2.0]}})
    assert record.values(Figure("ours", "w", "ttft_ms.p50")) == {0: 2.0}


def test_what_was_written_gives_the_same_figures_again() -> None:
    record = Record()
    record.add("ours", "w", 0, {"speed": 10.0})
    record.add("vllm", "w", 0, {"speed": 4.0})
    again = Record.from_json(json.loads(json.dumps(record.as_json())))
    assert again.outcome(RATIO) == record.outcome(RATIO)


@pytest.mark.parametrize(
    ("relation", "at_most", "ours", "peer", "met"),
    [("ratio", True, 4.0, 8.0, True), ("difference", True, 8.0, 4.0, False), ("value", False, 0.4, None, False)],
)
def test_relations(relation: str, at_most: bool, ours: float, peer: float | None, met: bool) -> None:
    figure = Figure("ours", "w", "x")
    check = Check("row", "title", "ms", figure, None if peer is None else figure, relation, at_most, reach=0.5)
    assert check.is_met(check.value(ours, peer), check.reach) is met


def test_every_check_measures_what_is_run() -> None:
    special = {"speed", "first-token", "start", "memory"}
    assert {figure.workload for check in CHECKS for figure in check.figures} <= COMPARED.keys() | special
    assert all(check.reach is not None or check.aim is not None for check in CHECKS)


def test_requests_are_the_same_for_every_side_and_others_each_round() -> None:
    workload = Workload("w", 4, 2, 8, 1, 2)
    first, again, other = (make_requests(workload, ["a", "b"], vocab_size=500, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [request.adapter for request in first] == ["a", "b", "a", "b"]
