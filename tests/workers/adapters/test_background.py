"""Threads for work that may hang: other jobs run beside a slow one, and a job over its limit is abandoned.

Time passes, and jobs are checked, only when a test says so; the pool's own watching changes nothing then.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest

from lorafleet.workers.adapters.background import SLOW_S, BackgroundThreads
from lorafleet.workers.errors import AdapterUnavailableError, DrainingError

TIMEOUT_S = 20.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Jobs:
    """Jobs that end on command."""

    def __init__(self) -> None:
        self.begun: dict[str, threading.Event] = {}
        self.may_end: dict[str, threading.Event] = {}

    def make(self, name: str) -> Callable[[], str]:
        self.begun[name], self.may_end[name] = threading.Event(), threading.Event()
        return partial(self._run, name)

    def _run(self, name: str) -> str:
        self.begun[name].set()
        assert self.may_end[name].wait(TIMEOUT_S)
        return name

    def wait_for(self, name: str) -> None:
        assert self.begun[name].wait(TIMEOUT_S)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    for event in jobs.may_end.values():
        event.set()


def pool_of(num_threads: int, clock: Clock, *, max_slow: int = 8) -> BackgroundThreads:
    return BackgroundThreads(num_threads, "test", max_slow=max_slow, clock=clock)


def test_jobs_run_side_by_side_as_many_as_there_are_threads(clock: Clock, jobs: Jobs) -> None:
    pool = pool_of(2, clock)
    futures = [pool.submit(jobs.make(name)) for name in "abc"]
    jobs.wait_for("a")
    jobs.wait_for("b")
    assert not jobs.begun["c"].is_set()
    jobs.may_end["a"].set()
    jobs.wait_for("c")
    for event in jobs.may_end.values():
        event.set()
    assert [future.result(TIMEOUT_S) for future in futures] == ["a", "b", "c"]
    pool.close()


def test_what_a_job_raises_is_its_futures(clock: Clock) -> None:
    pool = pool_of(1, clock)
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result(TIMEOUT_S)
    assert pool.submit(lambda: 5).result(TIMEOUT_S) == 5, "and the thread goes on"
    pool.close()


def test_others_run_beside_a_slow_job(clock: Clock, jobs: Jobs) -> None:
    pool = pool_of(1, clock)
    slow = pool.submit(jobs.make("slow"))
    jobs.wait_for("slow")
    other = pool.submit(jobs.make("other"))
    pool.look()
    assert not jobs.begun["other"].is_set()
    clock.now_s += SLOW_S
    pool.look()
    jobs.wait_for("other")
    jobs.may_end["other"].set()
    assert other.result(TIMEOUT_S) == "other"
    assert not slow.done()
    jobs.may_end["slow"].set()
    assert slow.result(TIMEOUT_S) == "slow"
    pool.close()


def test_slow_jobs_are_bounded(clock: Clock, jobs: Jobs) -> None:
    pool = pool_of(1, clock, max_slow=2)
    for name in "abc":
        pool.submit(jobs.make(name))
        jobs.wait_for(name)
        clock.now_s += SLOW_S
        pool.look()
    late = pool.submit(jobs.make("late"))
    clock.now_s += SLOW_S
    pool.look()
    assert not jobs.begun["late"].is_set(), "two do not count, and the third one does"
    jobs.may_end["b"].set()
    jobs.may_end["late"].set()
    while not late.done():
        pool.look()  # finds the jobs that count now
    pool.close(0.0)


def test_a_job_over_its_limit_is_given_up_and_what_it_returns_is_dropped(clock: Clock, jobs: Jobs) -> None:
    pool = pool_of(1, clock)
    done: list[Future[str]] = []
    dropped: list[str] = []
    job = jobs.make("hung")
    hung = pool.submit(job, limit_s=5.0, what="Reading it", done=done.append, drop=dropped.append)
    jobs.wait_for("hung")
    clock.now_s += 4.9
    pool.look()
    assert not hung.done() and pool.num_given_up == 0
    clock.now_s += 0.1
    pool.look()
    with pytest.raises(AdapterUnavailableError, match=r"^Reading it took more than 5 s and was given up"):
        hung.result(0)
    assert done == [hung] and pool.num_given_up == 1
    assert pool.submit(lambda: "next").result(TIMEOUT_S) == "next"
    jobs.may_end["hung"].set()
    while not dropped:
        pool.look()
    assert done == [hung] and dropped == ["hung"] and pool.num_given_up == 0
    pool.close()


def test_when_all_hang_the_next_ones_are_refused_until_one_ends(clock: Clock, jobs: Jobs) -> None:
    pool = pool_of(1, clock, max_slow=1)
    for name in "ab":
        pool.submit(jobs.make(name), limit_s=5.0)
        jobs.wait_for(name)
        clock.now_s += 5.0
        pool.look()
    late: Future[str] = pool.submit(jobs.make("late"))
    pool.look()
    with pytest.raises(AdapterUnavailableError, match=r"^2 reads of adapters hang"):
        late.result(0)
    jobs.may_end["a"].set()
    later = pool.submit(jobs.make("later"))
    jobs.may_end["later"].set()
    while not later.done():
        pool.look()
    assert not later.exception() or "hang" in str(later.exception())  # it came before the thread was free
    assert pool.submit(lambda: 5).result(TIMEOUT_S) == 5
    pool.close(0.0)


def test_closing_waits_for_what_runs_and_drops_the_rest(clock: Clock, jobs: Jobs) -> None:
    pool = pool_of(1, clock)
    running, waiting = pool.submit(jobs.make("a")), pool.submit(jobs.make("b"))
    jobs.wait_for("a")
    closer = threading.Thread(target=pool.close, args=[TIMEOUT_S], daemon=True)
    closer.start()
    while not pool._is_closed:
        closer.join(0.001)
    jobs.may_end["a"].set()
    closer.join(TIMEOUT_S)
    assert running.result(0) == "a"
    assert isinstance(waiting.exception(0), DrainingError)
    assert isinstance(pool.submit(lambda: 5).exception(0), DrainingError)


def test_closing_does_not_wait_for_what_hangs(clock: Clock, jobs: Jobs) -> None:
    pool = pool_of(1, clock)
    running = pool.submit(jobs.make("a"))
    jobs.wait_for("a")
    pool.close(0.0)
    assert isinstance(running.exception(0), DrainingError)


def test_threads_give_way_whoever_started_them(clock: Clock) -> None:
    if sys.platform != "linux":
        pytest.skip("threads have no priority of their own")
    pool = pool_of(1, clock)

    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def of_another_pool() -> int:
        inner = pool_of(1, clock)
        found = inner.submit(nice).result(TIMEOUT_S)
        inner.close()
        return found

    expected = os.getpriority(os.PRIO_PROCESS, os.getpid()) + 10
    assert pool.submit(nice).result(TIMEOUT_S) == pool.submit(of_another_pool).result(TIMEOUT_S) == expected
    pool.close()


def test_a_process_ends_though_a_read_hangs(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    program = (
        "import sys\n"
        "from lorafleet.workers.adapters.background import BackgroundThreads\n"
        "BackgroundThreads(1, 'x').submit(lambda: open(sys.argv[1]).read())\n"
    )
    subprocess.run([sys.executable, "-c", program, str(fifo)], check=True, timeout=60)
