"""Takes loads and unloads in turn: one at a time for each name, different names in parallel, all within bounds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from lorafleet.workers.errors import AdapterConflictError, QueueFullError, quoted

MAX_SIDE_BY_SIDE = 32  # names loaded at once
MAX_UPDATES = 1024  # running and waiting
MAX_OF_NAME = 64  # of these, for one name
TURN_S = 30.0  # the longest wait for a turn; gateways wait longer for the result


class UpdateTurns:
    """The turns: whoever holds `of(name)` is the only one to update that name."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._num_of_name: Counter[str] = Counter()
        self._places = asyncio.Semaphore(MAX_SIDE_BY_SIDE)

    @asynccontextmanager
    async def of(self, name: str, *, takes_place: bool) -> AsyncIterator[None]:
        """Wait for the turn and hold it. takes_place: whether it is a load, which counts against `MAX_SIDE_BY_SIDE`.

        Raises `QueueFullError` when too many wait, `AdapterConflictError` when the turn does not come in time.
        """
        if self._num_of_name.total() >= MAX_UPDATES or self._num_of_name[name] >= MAX_OF_NAME:
            raise QueueFullError(
                f"Too many loads and unloads are under way: {MAX_UPDATES} in all or {MAX_OF_NAME} of {quoted(name)} "
                "are the limit. Try again later."
            )
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._num_of_name[name] += 1
        has_lock = has_place = False
        try:
            try:
                async with asyncio.timeout(TURN_S):
                    has_lock = await lock.acquire()
                    if takes_place:
                        has_place = await self._places.acquire()
            except TimeoutError:
                raise AdapterConflictError(
                    f"Another load or unload of {quoted(name)} is still under way."
                    if not has_lock
                    else f"{MAX_SIDE_BY_SIDE} other adapters are being loaded, and none was done in {TURN_S:g} s.",
                    param="lora_name",
                ) from None
            yield
        finally:
            if has_place:
                self._places.release()
            if has_lock:
                lock.release()
            self._num_of_name[name] -= 1
            if not self._num_of_name[name]:
                del self._num_of_name[name]
