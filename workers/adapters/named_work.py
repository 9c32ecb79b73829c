"""Work by name: jobs on one name run in the order of submission, jobs on different names run side by side.

Each job has a slow part, which reads files, may hang and changes nothing, and a quick part, which makes the change. So
an abandoned job leaves nothing behind, however late it ends, and the next job for its name can begin.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from lorafleet.workers.adapters.background import BackgroundThreads
from lorafleet.workers.errors import DrainingError

_NUM_THREADS = 4

_Name = TypeVar("_Name", bound=Hashable)
_Read = TypeVar("_Read")
_Result = TypeVar("_Result")


@dataclass(slots=True, eq=False)
class _Piece:
    read: Callable[[], Any]
    change: Callable[[Any], Any]
    limit_s: float
    future: Future[Any]


class NamedWork(Generic[_Name]):
    """Thread-safe."""

    def __init__(self) -> None:
        self._threads = BackgroundThreads(_NUM_THREADS, "lorafleet-register")
        self._lock = threading.Lock()
        self._lines: dict[_Name, deque[_Piece]] = {}  # the first of each is running

    def submit(
        self, name: _Name, read: Callable[[], _Read], change: Callable[[_Read], _Result], *, limit_s: float
    ) -> Future[_Result]:
        """Run both parts after all earlier jobs for this name.

        limit_s: after this long the slow part is abandoned and the future fails with `AdapterUnavailableError`.
        """
        future: Future[_Result] = Future()
        future.set_running_or_notify_cancel()  # a waiter cannot cancel it
        piece = _Piece(read, change, limit_s, future)
        with self._lock:
            line = self._lines.setdefault(name, deque())
            line.append(piece)
            is_first = len(line) == 1
        if is_first:
            self._begin(name, piece)
        return future

    def close(self) -> None:
        """Fail all jobs that do not end soon."""
        with self._lock:
            waiting = []
            for line in self._lines.values():
                while len(line) > 1:
                    waiting.append(line.pop())
        for piece in waiting:
            piece.future.set_exception(DrainingError("The engine is closed. Create another one."))
        self._threads.close()

    def _begin(self, name: _Name, piece: _Piece) -> None:
        self._threads.submit(
            piece.read, limit_s=piece.limit_s, what="Reading the adapter", done=partial(self._finish, name, piece)
        )

    def _finish(self, name: _Name, piece: _Piece, reading: Future[Any]) -> None:
        result, error = None, reading.exception()
        if error is None:
            try:
                result = piece.change(reading.result())
            except BaseException as raised:
                error = raised
        with self._lock:
            line = self._lines[name]
            line.popleft()
            following = line[0] if line else None
            if following is None:
                del self._lines[name]
        if error is None:
            piece.future.set_result(result)
        else:
            piece.future.set_exception(error)
        if following is not None:
            self._begin(name, following)
