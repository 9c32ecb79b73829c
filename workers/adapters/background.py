"""Threads for what must not hold up the engine: reading, verifying, converting and copying adapters.

A read may hang for ever, on a network disk that does not answer, and no thread can be stopped. So a job that is slow
does not count any more: others run beside it. One that exceeds its limit is given up: whoever waits for it is told,
what it still returns is dropped, and its thread ends with it. Threads are daemons, so that a process can end meanwhile.
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

SLOW_S = 1.0  # a job that has run for so long does not count
MAX_SLOW = 128  # jobs that do not count
CLOSE_S = 2.0  # that `close` waits for running jobs
_IDLE_S = 10.0  # after which a thread without work ends
# Measured with benchmarks/stalls.py on two busy cores: 0 lets a load take half of a core from a step, 19 makes it wait
# for seconds.
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
    is_slow: bool = False  # it does not count
    is_over: bool = False  # its future has an outcome, or is about to get one
    is_given_up: bool = False


class BackgroundThreads:
    """A pool whose threads give way to the engine's. Jobs start in the order that they came in.

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
        """num_threads: jobs that run side by side and count. max_slow: those that run beside them and do not."""
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

        limit_s: after so long it is given up, and the future fails with `AdapterUnavailableError`. what: the subject of
        that message. done: called with the future when it is done, by a thread of this pool, never by the caller's.
        drop: called with what `work` returned after it was given up.
        """
        future: Future[_T] = Future()
        future.set_running_or_notify_cancel()  # nobody who waits can cancel it
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
        """Jobs that still run though nobody waits for them any more."""
        with self._lock:
            return sum(job.is_given_up for job in self._running)

    def look(self) -> None:
        """Find the jobs that are slow and those to be given up."""
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
        """Until nothing is to be done any more but what was given up; whether that is so."""
        with self._lock:
            return self._has_ended.wait_for(self._is_done, wait_s)

    def close(self, wait_s: float = CLOSE_S, *, drops: bool = True) -> None:
        """Wait for what runs, for so long at most, and give up the rest. drops: what has not begun, at once."""
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
        """The lock is held."""
        return not self._queue and all(job.is_given_up for job in self._running)

    def _staff(self) -> None:
        """Have a thread for the last job in line, if there may be one more. The lock is held."""
        if len(self._queue) <= self._num_idle:
            self._has_work.notify()
        elif self._num_up - self._num_slow < self._num_threads:
            self._num_up += 1
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
            if not self._is_watched:
                self._is_watched = True
                threading.Thread(target=self._watch, name=f"{self._name}-watch", daemon=True).start()

    def _are_all_lost(self) -> bool:
        """Whether no thread will ever take a job, as far as anybody knows. The lock is held."""
        is_full = self._num_up - self._num_slow >= self._num_threads
        return is_full and len(self._running) == self._num_up and all(job.is_given_up for job in self._running)

    def _run(self) -> None:
        """A thread's life."""
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
                del result  # it may be large, and the next job far away
            self._end(job)
            del job

    def _next(self) -> _Job | None:
        """Wait for a job. None: this thread is one too many, or has waited for long."""
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
        """For work. False: there is none."""
        self._num_idle += 1
        was_told = not self._is_closed and self._has_work.wait(_IDLE_S)
        self._num_idle -= 1
        return bool(self._queue) or (was_told and not self._is_closed)

    def _is_wanted(self, job: _Job) -> bool:
        """Whether a job that has ended is to have its outcome, and was not given up."""
        with self._lock:
            is_wanted, job.is_over = not job.is_over, True
            return is_wanted

    def _end(self, job: _Job) -> None:
        with self._lock:
            self._running.remove(job)
            self._num_slow -= job.is_slow
            self._has_ended.notify_all()

    def _watch(self) -> None:
        """Look several times while a job becomes slow, for as long as jobs run."""
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
        f"{job.what} has taken more than {job.limit_s:.3g} s and is given up: the storage may not answer. Try again "
        "later.",
        param="model",
    )


def _all_lost(num_hung: int) -> AdapterUnavailableError:
    return AdapterUnavailableError(
        f"{num_hung} reads of adapters hang, and no other is begun until one of them ends. Try again later.",
        param="model",
    )


def _closed() -> DrainingError:
    return DrainingError("The engine is closed. Create another one.")


def _give_way() -> None:
    # Without OpenMP teams of their own: two teams that share the cores slow each other at every barrier.
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where a thread has a priority of its own
        nice = os.getpriority(os.PRIO_PROCESS, os.getpid()) + _NICE  # not this thread's, which may be of a pool's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
