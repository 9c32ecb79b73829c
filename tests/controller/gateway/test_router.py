"""The choice of a worker, as a table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.controller.gateway.router import WorkerView, choose_worker

IDLE = WorkerView("a", ready=True, suspect=False, max_num_seqs=8, max_loras=2, num_pages=100, num_free_pages=100)
B = replace(IDLE, worker_id="b")
HOT = frozenset({"hot"})
FULL = frozenset({"x", "y"})


@pytest.mark.parametrize(
    ("workers", "adapter", "chosen"),
    [
        pytest.param([], "", None, id="no worker"),
        pytest.param([replace(IDLE, ready=False)], "", None, id="none is ready"),
        pytest.param([IDLE], "", "a", id="the only one"),
        pytest.param([replace(IDLE, num_running=1), B], "", "b", id="the idler one"),
        pytest.param([replace(IDLE, num_unreported=1), B], "", "b", id="requests since the heartbeat count"),
        pytest.param([replace(IDLE, num_waiting=1), replace(B, num_running=4)], "", "b", id="a queue costs most"),
        pytest.param([replace(IDLE, suspect=True), replace(B, num_running=8)], "", "b", id="not a suspect one"),
        pytest.param([replace(IDLE, suspect=True)], "", "a", id="a suspect one rather than none"),
        pytest.param([replace(IDLE, max_loras=0)], "hot", None, id="LoRA is off"),
        pytest.param([replace(IDLE, max_loras=0), replace(B, num_running=7)], "hot", "b", id="only LoRA workers"),
        pytest.param([replace(IDLE, num_running=3, device_adapters=HOT), B], "hot", "a", id="where the adapter is"),
        pytest.param([replace(IDLE, num_running=5, device_adapters=HOT), B], "hot", "b", id="but not overloaded"),
        pytest.param([replace(IDLE, device_adapters=FULL), replace(B, num_running=1)], "hot", "b", id="a free slot"),
        pytest.param([replace(IDLE, num_free_pages=2), replace(B, num_running=3)], "", "b", id="free KV pages"),
    ],
)
def test_the_choice(workers: list[WorkerView], adapter: str, chosen: str | None) -> None:
    for order in (workers, workers[::-1]):
        worker = choose_worker(order, [adapter] if adapter else [])
        assert (worker.worker_id if worker else None) == chosen


def test_a_cold_adapter_has_one_home_whichever_gateway_asks() -> None:
    workers = [replace(IDLE, worker_id=f"w{number}") for number in range(5)]
    homes = set()
    for number in range(50):
        home = choose_worker(workers, [f"adapter-{number}"])
        assert home is not None
        assert choose_worker(workers[::-1], [f"adapter-{number}"]) == home
        homes.add(home.worker_id)
    assert len(homes) == 5


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 20), st.integers(0, 20)), max_size=6))
def test_a_ready_worker_is_always_found_and_never_one_that_is_not(
    loads: list[tuple[bool, bool, int, int]],
) -> None:
    workers = [
        replace(IDLE, worker_id=f"w{number}", ready=ready, suspect=suspect, num_running=running, num_waiting=waiting)
        for number, (ready, suspect, running, waiting) in enumerate(loads)
    ]
    chosen = choose_worker(workers, [])
    assert (chosen is not None) == any(worker.ready for worker in workers)
    assert chosen is None or chosen.ready


@pytest.mark.parametrize(
    ("workers", "chosen"),
    [
        pytest.param([IDLE], None, id="too few slots"),
        pytest.param([replace(IDLE, max_loras=3), replace(B, num_running=1)], "a", id="enough slots"),
        pytest.param(
            [
                replace(IDLE, max_loras=4, device_adapters=frozenset({"x", "y"})),
                replace(B, max_loras=4, num_running=4, device_adapters=frozenset({"x", "y", "z"})),
            ],
            "b",
            id="where more of them are",
        ),
        pytest.param(
            [
                replace(IDLE, max_loras=4, device_adapters=frozenset({"p", "q", "r"})),
                replace(B, max_loras=4, num_running=3, device_adapters=frozenset({"x"})),
            ],
            "b",
            id="where fewer must go for them",
        ),
    ],
)
def test_the_choice_for_several_adapters(workers: list[WorkerView], chosen: str | None) -> None:
    for order in (workers, workers[::-1]):
        worker = choose_worker(order, ["x", "y", "z"])
        assert (worker.worker_id if worker else None) == chosen
