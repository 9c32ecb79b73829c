"""The threads that process requests' text: JSON, chat templates, tokenizers.

Owns: whose turn it is. Leaves to others: the work, and the bound on one request's work.

A job is long if it handles more than `SHORT_BYTES`. Long jobs leave one thread to the short ones, and those of one
tenant take at most half of the threads; one long job may always run, however many short ones arrive. Tenants take
turns, among the short jobs and among the long ones.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

SHORT_BYTES: Final = 1 << 16  # some 30 ms of a tokenizer

_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class _Job:
    tenant: str
    is_long: bool
    turn: asyncio.Future[None]


class _Line:
    """Waiting jobs: tenants in turn, each tenant's jobs in the order of arrival."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, deque[_Job]] = OrderedDict()  # by tenant, the last served last

    def add(self, job: _Job) -> None:
        self._jobs.setdefault(job.tenant, deque()).append(job)

    def take(self, may_run: Callable[[str], bool]) -> _Job | None:
        """Take the next job of a tenant that may run one. Drops cancelled jobs."""
        for tenant, jobs in list(self._jobs.items()):
            while jobs and jobs[0].turn.done():
                jobs.popleft()
            if not jobs:
                del self._jobs[tenant]
            elif may_run(tenant):
                job = jobs.popleft()
                if jobs:
                    self._jobs.move_to_end(tenant)
                else:
                    del self._jobs[tenant]
                return job
        return None


class TextThreads:
    """The threads of one event loop; `close` them."""

    def __init__(self, num_threads: int, executor: Executor | None = None) -> None:
        """executor: one of `num_threads` threads, in place of its own."""
        self._num_free = num_threads
        self._max_long = max(1, num_threads - 1)
        self._max_long_of_one = max(1, num_threads // 2)
        self._num_long: Counter[str] = Counter()  # running, by tenant
        self._short, self._long = _Line(), _Line()
        self._last_was_long = False
        self._executor = executor or ThreadPoolExecutor(num_threads, thread_name_prefix="text")

    async def run(self, tenant: str, num_bytes: int, function: Callable[[], _T]) -> _T:
        """Call `function` when it is the tenant's turn, and return its result. num_bytes: size of its input.

        A cancelled caller gives up its turn, but a job that has begun runs to its end.
        """
        loop = asyncio.get_running_loop()
        job = _Job(tenant, num_bytes > SHORT_BYTES, loop.create_future())
        (self._long if job.is_long else self._short).add(job)
        self._start()
        try:
            await job.turn
        except asyncio.CancelledError:
            if job.turn.done() and not job.turn.cancelled():
                self._end(job)
            raise
        future = self._executor.submit(function)
        future.add_done_callback(lambda _: self._call(loop, job))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Start no more jobs."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _call(self, loop: asyncio.AbstractEventLoop, job: _Job) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._end, job)

    def _start(self) -> None:
        while self._num_free:
            num_long = self._num_long.total()
            job = self._take_long() if not num_long and not self._last_was_long else None
            job = job or self._short.take(lambda tenant: True)
            if job is None and num_long < self._max_long:
                job = self._take_long()
            if job is None:
                return
            self._last_was_long = job.is_long
            self._num_free -= 1
            self._num_long[job.tenant] += job.is_long
            job.turn.set_result(None)

    def _take_long(self) -> _Job | None:
        return self._long.take(lambda tenant: self._num_long[tenant] < self._max_long_of_one)

    def _end(self, job: _Job) -> None:
        self._num_free += 1
        self._num_long[job.tenant] -= job.is_long
        if not self._num_long[job.tenant]:
            del self._num_long[job.tenant]
        self._start()
