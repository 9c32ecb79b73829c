"""The turns on the threads for text, with an executor that ends its jobs on command."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

import pytest

from lorafleet.controller.gateway.streams.text_threads import SHORT_BYTES, TextThreads

SHORT, LONG = SHORT_BYTES, SHORT_BYTES + 1


class Scripted(Executor):
    """Begins each job at once and ends it when the test says so."""

    def __init__(self) -> None:
        self.running: dict[str, Future[Any]] = {}  # by what the job returns

    def submit(self, function: Callable[[], Any], /, *_: Any, **__: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self.running[function()] = future
        return future


class Bench:
    """Text threads and the jobs requested."""

    def __init__(self, num_threads: int) -> None:
        self.executor = Scripted()
        self.threads = TextThreads(num_threads, self.executor)
        self.tasks: dict[str, asyncio.Task[str]] = {}

    async def ask(self, *jobs: tuple[str, int]) -> None:
        """Request jobs for tenants, each named by tenant and number."""
        for tenant, num_bytes in jobs:
            name = f"{tenant}{sum(other.startswith(tenant) for other in self.tasks) + 1}"
            self.tasks[name] = asyncio.create_task(self.threads.run(tenant, num_bytes, partial(str, name)))
        await self.settle()

    async def end(self, name: str) -> None:
        self.executor.running.pop(name).set_result(name)
        await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def running(self) -> list[str]:
        return sorted(self.executor.running)


@pytest.mark.parametrize(
    ("num_threads", "jobs", "running"),
    [
        (2, [("a", LONG), ("a", LONG), ("b", LONG)], ["a1"]),
        (2, [("a", LONG), ("a", LONG), ("b", SHORT)], ["a1", "b1"]),
        (2, [("a", LONG), ("a", LONG), ("a", SHORT)], ["a1", "a3"]),
        (2, [("a", SHORT), ("a", SHORT), ("b", SHORT)], ["a1", "a2"]),
        (4, [("a", LONG), ("a", LONG), ("a", LONG), ("b", LONG), ("b", LONG)], ["a1", "a2", "b1"]),
        (4, [("a", LONG)] * 9 + [("b", SHORT)] * 2, ["a1", "a2", "b1", "b2"]),
        (1, [("a", LONG), ("b", SHORT)], ["a1"]),
    ],
)
async def test_long_jobs_leave_a_thread_and_those_of_one_tenant_half(
    num_threads: int, jobs: list[tuple[str, int]], running: list[str]
) -> None:
    bench = Bench(num_threads)
    await bench.ask(*jobs)
    assert bench.running == running
    while bench.executor.running:
        await bench.end(bench.running[0])
    assert {name: task.result() for name, task in bench.tasks.items()} == {name: name for name in bench.tasks}


async def test_tenants_take_turns() -> None:
    bench = Bench(1)
    await bench.ask(*[("a", SHORT)] * 4, *[("b", SHORT)] * 2, ("c", SHORT))
    order = []
    while bench.executor.running:
        order += bench.running
        await bench.end(bench.running[0])
    assert order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


async def test_short_jobs_that_keep_coming_do_not_hold_up_a_long_one() -> None:
    bench = Bench(2)
    await bench.ask(*[("a", SHORT)] * 6, ("b", LONG))
    await bench.end("a1")
    assert bench.running == ["a2", "b1"]
    await bench.end("a2")
    assert bench.running == ["a3", "b1"]


async def test_long_jobs_on_a_single_thread_let_short_ones_in_between() -> None:
    bench = Bench(1)
    await bench.ask(*[("a", LONG)] * 3, ("b", SHORT))
    await bench.end("a1")
    assert bench.running == ["b1"]
    await bench.end("b1")
    assert bench.running == ["a2"]


async def test_a_cancelled_caller_gives_up_its_turn_and_a_begun_job_keeps_its_thread() -> None:
    bench = Bench(1)
    await bench.ask(("a", SHORT), ("b", SHORT), ("c", SHORT))
    bench.tasks["b1"].cancel()
    bench.tasks["a1"].cancel()
    await bench.settle()
    assert bench.tasks["a1"].cancelled()
    assert bench.running == ["a1"]
    await bench.end("a1")
    assert bench.running == ["c1"]
    await bench.end("c1")
    assert bench.tasks["c1"].result() == "c1"
    await bench.ask(("d", SHORT))
    assert bench.running == ["d1"]  # nothing leaked


async def test_a_turn_granted_while_its_owner_is_cancelled_goes_to_the_next() -> None:
    bench = Bench(1)
    await bench.ask(("a", SHORT), ("b", SHORT), ("c", SHORT))
    bench.executor.running.pop("a1").set_result("a1")
    await asyncio.sleep(0)  # the end of a1 has given b1 its turn, which b1 has not seen
    bench.tasks["b1"].cancel()
    await bench.settle()
    assert bench.running == ["c1"]


async def test_on_real_threads_results_and_errors_come_back() -> None:
    threads = TextThreads(2)

    def fail() -> None:
        raise ValueError("no")

    assert await asyncio.gather(*(threads.run("a", LONG, partial(int, n)) for n in range(20))) == list(range(20))
    with pytest.raises(ValueError, match="no"):
        await threads.run("a", SHORT, fail)
    threads.close()
