"""Background threads that read, verify, convert and copy adapters, so that the engine does not wait.

A read may hang forever on an unresponsive network disk, and no thread can be killed. So a slow job stops counting
against the pool's size: others run beside it. A job that exceeds its limit is abandoned: its future fails, its late
result is dropped, and its thread ends with it. Threads are daemons, so the process can exit meanwhile.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lorafleet.workers.errors import AdapterUnavailableError, DrainingError, LoRAFleetError

SLOW_S = 1.0  # a job that has run this long stops counting
MAX_SLOW = 128  # jobs that do not count at one time
CLOSE_S = 2.0  # how long `close` waits for running jobs
_IDLE_S = 10.0  # an idle thread ends after this long
# Measured with benchmarks/stalls.py on two busy cores: at 0 a load takes half a core from a step, at 19 it
# waits for seconds.
_NICE = 10

_T = TypeVar("_T")


@dataclass(slots=True, eq=False, kw_only=True)
class _Job:
    work: Callable[[], Any]
    future: Future[Any]
    limit_s: float
    what: str
    drop: Callable[[Any], object] | None
    began: float = 0.0
    is_slow: bool = False  # does not count against the pool's size
    is_over: bool = False  # its future has, or is about to get, an outcome
    is_given_up: bool = False


class BackgroundThreads:
    """A thread pool with lower priority than the engine's threads. Jobs start in submission order.

    `clock` is for tests, which call `look` themselves.
    """

    def __init__(
        self,
        num_threads: int,
        name: str,
        *,
        max_slow: int = MAX_SLOW,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """num_threads: jobs that run at once and count. max_slow: slow jobs that run beside them and do not count."""
        self._num_threads = num_threads
        self._name = name
        self._max_slow = max_slow
        self._clock = clock
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)  # for idle threads
        self._has_begun = threading.Condition(self._lock)  # for the watching thread
        self._has_ended = threading.Condition(self._lock)  # for `close`
        self._queue: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._num_up = 0  # threads
        self._num_idle = 0
        self._num_slow = 0
        self._is_watched = False
        self._is_closed = False

    def submit(
        self,
        work: Callable[[], _T],
        *,
        limit_s: float = math.inf,
        what: str = "This",
        done: Callable[[Future[_T]], object] | None = None,
        drop: Callable[[_T], object] | None = None,
    ) -> Future[_T]:
        """Run `work` on a thread.

        limit_s: after this long the job is abandoned and the future fails with `AdapterUnavailableError`. what: the
        subject of that message. done: called with the finished future on one of this pool's threads, never the
        caller's. drop: called with a result that came after the job was abandoned.
        """
        future: Future[_T] = Future()
        future.set_running_or_notify_cancel()  # a waiter cannot cancel it
        if done is not None:
            future.add_done_callback(done)
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                self._queue.append(_Job(work=work, future=future, limit_s=limit_s, what=what, drop=drop))
                self._staff()
        if is_closed:
            future.set_exception(_closed())
        return future

    @property
    def num_given_up(self) -> int:
        """Return the number of abandoned jobs that still run."""
        with self._lock:
            return sum(job.is_given_up for job in self._running)

    def look(self) -> None:
        """Mark jobs that have become slow, and abandon those over their limit."""
        ended: list[tuple[_Job, LoRAFleetError]] = []
        with self._lock:
            now = self._clock()
            for job in self._running:
                seconds = now - job.began
                if seconds >= job.limit_s and not job.is_over:
                    job.is_over = job.is_given_up = True
                    ended.append((job, _given_up(job)))
                if not job.is_slow and (job.is_given_up or seconds >= SLOW_S) and self._num_slow < self._max_slow:
                    job.is_slow = True
                    self._num_slow += 1
            for _ in range(len(self._queue)):
                self._staff()
            if self._are_all_lost():
                ended += [(job, _all_lost(len(self._running))) for job in self._queue]
                self._queue.clear()
                self._has_ended.notify_all()
        for job, error in ended:
            job.future.set_exception(error)

    def wait(self, wait_s: float) -> bool:
        """Wait until only abandoned jobs are left; return whether that is so."""
        with self._lock:
            return self._has_ended.wait_for(self._is_done, wait_s)

    def close(self, wait_s: float = CLOSE_S, *, drops: bool = True) -> None:
        """Wait at most `wait_s` for running jobs and abandon the rest. drops: fail jobs that have not begun at once."""
        lost: list[_Job] = []
        with self._lock:
            self._is_closed = True
            if drops:
                lost += self._queue
                self._queue.clear()
            self._has_work.notify_all()
            self._has_begun.notify_all()
            self._has_ended.wait_for(self._is_done, wait_s)
            lost += [*self._queue, *(job for job in self._running if not job.is_over)]
            self._queue.clear()
            for job in lost:
                job.is_over = job.is_given_up = True
        for job in lost:
            job.future.set_exception(_closed())

    def _is_done(self) -> bool:
        """Return whether only abandoned jobs are left. The lock is held."""
        return not self._queue and all(job.is_given_up for job in self._running)

    def _staff(self) -> None:
        """Wake or start a thread for the last queued job if the pool has room. The lock is held."""
        if len(self._queue) <= self._num_idle:
            self._has_work.notify()
        elif self._num_up - self._num_slow < self._num_threads:
            self._num_up += 1
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
            if not self._is_watched:
                self._is_watched = True
                threading.Thread(target=self._watch, name=f"{self._name}-watch", daemon=True).start()

    def _are_all_lost(self) -> bool:
        """Return whether all threads hang, so that queued jobs may never run. The lock is held."""
        is_full = self._num_up - self._num_slow >= self._num_threads
        return is_full and len(self._running) == self._num_up and all(job.is_given_up for job in self._running)

    def _run(self) -> None:
        """Run jobs until this thread is not needed."""
        _give_way()
        while (job := self._next()) is not None:
            try:
                result = job.work()
            except BaseException as error:
                if self._is_wanted(job):
                    job.future.set_exception(error)
            else:
                if self._is_wanted(job):
                    job.future.set_result(result)
                elif job.drop is not None:
                    job.drop(result)
                del result  # may be large, and the next job may come late
            self._end(job)
            del job

    def _next(self) -> _Job | None:
        """Wait for a job. Return None if this thread is surplus or has been idle for long."""
        with self._lock:
            while True:
                is_surplus = self._num_up - self._num_slow > self._num_threads
                if is_surplus or not (self._queue or self._wait()):
                    self._num_up -= 1
                    return None
                if self._queue:
                    break
            job = self._queue.popleft()
            job.began = self._clock()
            self._running.add(job)
            if len(self._running) == 1:
                self._has_begun.notify()
            return job

    def _wait(self) -> bool:
        """Wait for work; return whether there is some."""
        self._num_idle += 1
        was_told = not self._is_closed and self._has_work.wait(_IDLE_S)
        self._num_idle -= 1
        return bool(self._queue) or (was_told and not self._is_closed)

    def _is_wanted(self, job: _Job) -> bool:
        """Mark a job that has ended; return whether its outcome is wanted, since it was not abandoned."""
        with self._lock:
            is_wanted, job.is_over = not job.is_over, True
            return is_wanted

    def _end(self, job: _Job) -> None:
        with self._lock:
            self._running.remove(job)
            self._num_slow -= job.is_slow
            self._has_ended.notify_all()

    def _watch(self) -> None:
        """Call `look` several times per `SLOW_S` for as long as jobs run."""
        while True:
            with self._lock:
                self._has_begun.wait_for(lambda: self._running or self._is_closed, _IDLE_S)
                if self._is_closed or not self._num_up:
                    self._is_watched = False
                    return
                self._has_begun.wait(SLOW_S / 4)
            self.look()


def _given_up(job: _Job) -> AdapterUnavailableError:
    return AdapterUnavailableError(
        f"{job.what} took more than {job.limit_s:.3g} s and was given up: the storage may not respond. Try again "
        "later.",
        param="model",
    )


def _all_lost(num_hung: int) -> AdapterUnavailableError:
    return AdapterUnavailableError(
        f"{num_hung} reads of adapters hang; no other can begin until one of them ends. Try again later.",
        param="model",
    )


def _closed() -> DrainingError:
    return DrainingError("The engine is closed. Create another one.")


def _give_way() -> None:
    # No OpenMP teams of their own: two teams that share cores slow each other down at every barrier.
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where each thread has its own priority
        nice = os.getpriority(os.PRIO_PROCESS, os.getpid()) + _NICE  # not this thread's own, maybe a pool's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
