"""The choice of a worker, as a table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.controller.gateway.routing.router import (
    LOAD_BOUND,
    TYPICAL_PACE,
    Wanted,
    choose_worker,
    complete_paces,
    expected_first_token_s,
)
from lorafleet.controller.gateway.routing.worker_view import Tier, WorkerView
from lorafleet.workers.scheduling.pace import Pace

IDLE = WorkerView("a", ready=True, suspect=False, max_num_seqs=8, max_loras=2, num_pages=100, num_free_pages=100)
B = replace(IDLE, worker_id="b")
DEVICE, HOST, DISK = ({"hot": tier} for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK))


@pytest.mark.parametrize(
    ("workers", "adapter", "chosen"),
    [
        pytest.param([], "", None, id="no worker"),
        pytest.param([replace(IDLE, ready=False)], "", None, id="none is ready"),
        pytest.param([IDLE], "", "a", id="the only one"),
        pytest.param([replace(IDLE, num_running=1), B], "", "b", id="the idler one"),
        pytest.param([replace(IDLE, num_unreported=1), B], "", "b", id="requests since the heartbeat count"),
        pytest.param(
            [replace(IDLE, num_prompt_tokens=500), replace(B, num_running=4)], "", "b", id="prompts before it"
        ),
        pytest.param([replace(IDLE, num_unreported_tokens=500), replace(B, num_running=4)], "", "b", id="sent prompts"),
        pytest.param(
            [replace(IDLE, num_running=8, num_waiting=2), replace(B, num_running=8, num_waiting=1)],
            "",
            "b",
            id="a queue",
        ),
        pytest.param(
            [replace(IDLE, pace=Pace(step_s=0.1)), replace(B, num_running=5, pace=Pace(step_s=0.03))],
            "",
            "b",
            id="not one that is slow",
        ),
        pytest.param(
            [replace(IDLE, num_running=1, pace=Pace(step_s=0.1)), B], "", "b", id="one that is not known to be slow"
        ),
        pytest.param(
            [replace(IDLE, num_running=1, pace=Pace(step_s=0.001)), B], "", "b", id="one that is not known to be fast"
        ),
        pytest.param(
            [replace(IDLE, num_running=9, pace=Pace(seat_s=9.0)), replace(B, num_running=10, pace=Pace(seat_s=3.0))],
            "",
            "b",
            id="seats come free",
        ),
        pytest.param([replace(IDLE, suspect=True), replace(B, num_running=8)], "", "b", id="not a suspect one"),
        pytest.param([replace(IDLE, suspect=True)], "", "a", id="a suspect one rather than none"),
        pytest.param([replace(IDLE, max_loras=0)], "hot", None, id="LoRA is off"),
        pytest.param([replace(IDLE, max_loras=0), replace(B, num_running=7)], "hot", "b", id="only LoRA workers"),
        pytest.param([replace(IDLE, num_running=3, tiers=DEVICE), replace(B, tiers=HOST)], "hot", "a", id="in a slot"),
        pytest.param([replace(IDLE, num_running=3, tiers=HOST), replace(B, tiers=DISK)], "hot", "a", id="on the host"),
        pytest.param([replace(IDLE, num_running=3, tiers=DISK), B], "hot", "a", id="registered"),
        pytest.param(
            [replace(IDLE, num_running=10, tiers=DEVICE), replace(B, tiers=DISK)], "hot", "b", id="but not overloaded"
        ),
        pytest.param(
            [
                replace(IDLE, tiers={**HOST, "x": Tier.DEVICE, "y": Tier.DEVICE}, num_device_adapters=2),
                replace(B, num_running=1, tiers=HOST),
            ],
            "hot",
            "b",
            id="a free slot",
        ),
        pytest.param([replace(IDLE, num_free_pages=2), replace(B, num_running=3)], "", "b", id="free KV pages"),
    ],
)
def test_the_choice(workers: list[WorkerView], adapter: str, chosen: str | None) -> None:
    for order in (workers, workers[::-1]):
        worker = choose_worker(order, Wanted((adapter,) if adapter else (), num_prompt_tokens=100))
        assert (worker.worker_id if worker else None) == chosen


def test_a_cold_adapter_has_one_home_whichever_gateway_asks() -> None:
    workers = [replace(IDLE, worker_id=f"w{number}") for number in range(5)]
    homes = set()
    for number in range(50):
        wanted = Wanted((f"adapter-{number}",))
        home = choose_worker(workers, wanted, lot="one gateway")
        assert home is not None
        assert choose_worker(workers[::-1], wanted, lot="another") is home
        homes.add(home.worker_id)
    assert len(homes) == 5


def test_gateways_do_not_all_send_the_base_models_requests_to_one_idle_worker() -> None:
    workers = [replace(IDLE, worker_id=f"w{number}") for number in range(5)]
    chosen = {choose_worker(workers, Wanted(), lot=f"gateway {number}") for number in range(50)}
    assert len(chosen) == 5


def test_times_a_worker_has_not_measured_are_the_others() -> None:
    measured = [Pace(step_s=0.01), Pace(step_s=0.05, seat_s=2.0), Pace(step_s=0.02, seat_s=4.0), Pace()]
    paces = complete_paces([replace(IDLE, pace=pace) for pace in measured])
    assert [pace.step_s for pace in paces] == [0.01, 0.05, 0.02, 0.02]
    assert [pace.seat_s for pace in paces] == [3.0, 2.0, 4.0, 3.0]
    assert {pace.disk_load_s for pace in paces} == {TYPICAL_PACE.disk_load_s}


def test_a_prompt_goes_where_its_prefix_is_cached() -> None:
    wanted = Wanted(num_prompt_tokens=1000, num_cached={"a": 960})
    chosen = choose_worker([B, replace(IDLE, num_running=6)], wanted)
    assert chosen is not None
    assert chosen.worker_id == "a"
    chosen = choose_worker([B, replace(IDLE, num_running=12)], wanted)
    assert chosen is not None
    assert chosen.worker_id == "b", "but not into a queue that takes longer than computing it"


def test_a_hot_adapter_gets_a_second_home_while_a_cold_one_keeps_its_only_one() -> None:
    """Requests are sent to three workers, most of them for one adapter, and none ends."""
    workers = [replace(IDLE, worker_id=f"w{number}", tiers=DISK) for number in range(3)]
    homes: list[str] = []
    for _ in range(16):
        chosen = choose_worker(workers, Wanted(("hot",)))
        assert chosen is not None
        homes.append(chosen.worker_id)
        place = workers.index(chosen)
        workers[place] = replace(chosen, num_running=chosen.num_running + 1, tiers=DEVICE)
    assert len(set(homes[:7])) == 1
    assert len(set(homes)) >= 2


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 20), st.integers(0, 20)), max_size=6))
def test_a_ready_worker_is_always_found_and_never_one_that_is_not(
    loads: list[tuple[bool, bool, int, int]],
) -> None:
    workers = [
        replace(IDLE, worker_id=f"w{number}", ready=ready, suspect=suspect, num_running=running, num_waiting=waiting)
        for number, (ready, suspect, running, waiting) in enumerate(loads)
    ]
    chosen = choose_worker(workers, Wanted())
    assert (chosen is not None) == any(worker.ready for worker in workers)
    assert chosen is None or chosen.ready


@given(st.lists(st.integers(0, 40), min_size=2, max_size=6), st.integers(0, 5))
def test_no_affinity_overloads_a_worker(loads: list[int], favourite: int) -> None:
    workers = [
        replace(IDLE, worker_id=f"w{number}", num_running=min(8, load), num_waiting=max(0, load - 8))
        for number, load in enumerate(loads)
    ]
    favourite %= len(workers)
    workers[favourite] = replace(workers[favourite], tiers=DEVICE, pace=Pace(seat_s=0.001))
    wanted = Wanted(("hot",), num_prompt_tokens=4000, num_cached={f"w{favourite}": 3968})
    chosen = choose_worker(workers, wanted)
    assert chosen is not None
    mean = (sum(loads) + 1) / len(loads)
    assert chosen.num_requests < LOAD_BOUND * max(chosen.max_num_seqs, mean)


@given(st.integers(0, 20), st.integers(0, 5000), st.integers(0, 2000), st.integers(0, 100), st.sampled_from([*Tier]))
def test_more_work_never_makes_the_first_token_come_sooner(
    num_running: int, num_ahead: int, num_tokens: int, num_free_pages: int, tier: Tier
) -> None:
    def seconds(view: WorkerView, num_prompt_tokens: int = num_tokens, pace: Pace = TYPICAL_PACE) -> float:
        return expected_first_token_s(view, pace, Wanted(("hot",), num_prompt_tokens))

    view = replace(
        IDLE,
        num_running=num_running,
        num_prompt_tokens=num_ahead,
        num_free_pages=num_free_pages,
        tiers={"hot": tier},
    )
    before = seconds(view)
    assert seconds(view, num_tokens + 1) >= before
    assert seconds(replace(view, num_running=num_running + 1)) >= before
    assert seconds(replace(view, num_prompt_tokens=num_ahead + 1)) >= before
    assert seconds(replace(view, num_free_pages=max(0, num_free_pages - 1))) >= before
    assert seconds(replace(view, tiers={"hot": Tier(max(0, tier - 1))})) >= before
    assert seconds(view, pace=Pace(0.06, 0.001, 6.0, 0.04, 0.6)) >= before


@pytest.mark.parametrize(
    ("workers", "chosen"),
    [
        pytest.param([IDLE], None, id="too few slots"),
        pytest.param([replace(IDLE, max_loras=3), replace(B, num_running=1)], "a", id="enough slots"),
        pytest.param(
            [
                replace(IDLE, max_loras=4, tiers={"x": Tier.DEVICE, "y": Tier.DEVICE, "z": Tier.DISK}),
                replace(B, max_loras=4, num_running=4, tiers=dict.fromkeys("xyz", Tier.DEVICE)),
            ],
            "b",
            id="where more of them are",
        ),
        pytest.param(
            [
                replace(
                    IDLE,
                    max_loras=4,
                    tiers=dict.fromkeys("pqr", Tier.DEVICE) | dict.fromkeys("xyz", Tier.HOST),
                    num_device_adapters=3,
                ),
                replace(
                    B,
                    max_loras=4,
                    num_running=3,
                    tiers={"x": Tier.DEVICE, "y": Tier.HOST, "z": Tier.HOST},
                    num_device_adapters=1,
                ),
            ],
            "b",
            id="where fewer have to go for them",
        ),
    ],
)
def test_the_choice_for_several_adapters(workers: list[WorkerView], chosen: str | None) -> None:
    for order in (workers, workers[::-1]):
        worker = choose_worker(order, Wanted(("x", "y", "z")))
        assert (worker.worker_id if worker else None) == chosen
