"""The models that a report names, and their order."""

from __future__ import annotations

from lorafleet.proto import worker_pb2
from lorafleet.workers.scheduling.stats import EngineStats
from lorafleet.workers.server.load_report import MAX_USES, report


def uses(stats: EngineStats, rates: dict[str, float]) -> list[tuple[str, int, int, float]]:
    made = report(stats, worker_pb2.WORKER_READY, "worker", 1, rates)
    return [(use.digest, use.num_requests, use.num_output_tokens, use.output_tokens_per_s) for use in made.uses]


def test_models_with_requests_come_first_then_those_with_tokens() -> None:
    stats = EngineStats(requests_of={"b": 2, "": 1}, output_tokens_of={"": 7, "idle": 50, "late": 9})
    rates = {"": 0.5, "late": 1.5, "idle": 0.0}
    assert uses(stats, rates) == [("b", 2, 0, 0.0), ("", 1, 7, 0.5), ("late", 0, 9, 1.5), ("idle", 0, 50, 0.0)]


def test_a_report_stays_small() -> None:
    many = EngineStats(output_tokens_of={f"adapter-{number}": number for number in range(3 * MAX_USES)})
    named = uses(many, {})
    assert len(named) == MAX_USES and named[0][2] == 3 * MAX_USES - 1
