"""The line of requests that wait for a worker.

Owns: waking them in order when a worker may be free, a few in each turn of the event loop, so that a thousand of them
delay no one else. Leaves to others: when that is (session.py, pool.py), trying again (placing.py).
"""

from __future__ import annotations

import asyncio
from typing import Final

_NUM_AT_ONCE: Final = 16


class WaitingLine:
    """The line of one gateway, on its event loop."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], None] = {}  # in the order of arrival
        self._num_to_wake = 0  # how many of these have waited since before the last `move`

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, timeout_s: float) -> None:
        """Wait until the line has moved. Raises TimeoutError."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        try:
            async with asyncio.timeout(timeout_s):
                await future
        finally:
            self._waiting.pop(future, None)

    def move(self) -> None:
        """Have all requests that wait now try again."""
        is_moving = self._num_to_wake > 0
        self._num_to_wake = len(self._waiting)
        if self._waiting and not is_moving:
            asyncio.get_running_loop().call_soon(self._wake_some)

    def _wake_some(self) -> None:
        for _ in range(min(_NUM_AT_ONCE, self._num_to_wake, len(self._waiting))):
            future = next(iter(self._waiting))
            del self._waiting[future]
            if not future.done():
                future.set_result(None)
        self._num_to_wake = min(max(0, self._num_to_wake - _NUM_AT_ONCE), len(self._waiting))
        if self._num_to_wake:
            asyncio.get_running_loop().call_soon(self._wake_some)
