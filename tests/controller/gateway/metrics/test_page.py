"""The text of /metrics: rendered off the event loop, from one snapshot, and rarely enough to stay cheap."""

from __future__ import annotations

import asyncio
import threading

import pytest
from prometheus_client.core import GaugeMetricFamily

from lorafleet.controller.gateway.metrics.instruments import Metrics
from lorafleet.controller.gateway.metrics.page import MetricsPage, Snapshot
from lorafleet.controller.gateway.routing.worker_view import Tier, WorkerView


class Clock:
    """Stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class SlowMetrics(Metrics):
    """Metrics whose rendering takes as long as the test wants."""

    def __init__(self, cost: Clock, cost_s: float) -> None:
        super().__init__()
        self.cost, self.cost_s = cost, cost_s
        self.num_rendered = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def render(self) -> bytes:
        assert threading.current_thread() is not threading.main_thread()
        assert self.may_go_on.wait(10)
        self.num_rendered += 1
        self.cost.now += self.cost_s
        return b"%d" % self.num_rendered


async def test_the_event_loop_runs_while_a_page_is_rendered_and_all_callers_get_that_page() -> None:
    metrics = SlowMetrics(Clock(), 0.0)
    page = MetricsPage(metrics, Snapshot, cost_clock=metrics.cost)
    metrics.may_go_on.clear()
    asked = [asyncio.create_task(page.get()) for _ in range(5)]
    await asyncio.sleep(0)
    asked[0].cancel()
    await asyncio.sleep(0)
    metrics.may_go_on.set()
    assert await asyncio.gather(*asked[1:]) == [b"1"] * 4
    assert await page.get() == b"2"
    await page.close()


@pytest.mark.parametrize(("cost_s", "good_for_s"), [(0.01, 0.0), (0.3, 3.0)])
async def test_a_dear_page_is_kept_for_ten_times_its_cost_and_a_cheap_one_is_not(
    cost_s: float, good_for_s: float
) -> None:
    clock = Clock()
    metrics = SlowMetrics(Clock(), cost_s)
    page = MetricsPage(metrics, Snapshot, clock, metrics.cost)
    assert await page.get() == b"1"
    clock.now += good_for_s
    assert await page.get() == b"2"
    if good_for_s:
        clock.now += good_for_s - 0.1
        assert await page.get() == b"2"


async def test_collectors_see_the_moment_at_which_a_page_was_asked_for() -> None:
    tiers = {"a": Tier.HOST}
    view = WorkerView("w", True, False, 8, 2, tiers=tiers)
    metrics = Metrics()
    page = MetricsPage(metrics, lambda: Snapshot([view.frozen()]))

    class Collector:
        def collect(self) -> list[GaugeMetricFamily]:
            return [GaugeMetricFamily("host", "", value=page.snapshot.views[0].num_in(Tier.HOST))]

        def describe(self) -> list[GaugeMetricFamily]:
            return []

    metrics.registry.register(Collector())
    asked = asyncio.create_task(page.get())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tiers["b"] = Tier.HOST
    assert b"host 1.0" in await asked
    assert b"host 2.0" in await page.get()
