"""Where worker sessions put the tokens of a request, and its handler takes them out.

Owns: the bound, and waking the one reader. Leaves to others: what the tokens mean (generation.py).

All of it runs on the event loop's thread, so that nothing needs a lock. Sessions only ever `put` and `fail`, which
return at once: no client can hold up the pump.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

from lorafleet.workers.engine.request import FinishReason, TokenLogprobs
from lorafleet.workers.errors import DeadlineError, LoRAFleetError


class Arrived(NamedTuple):
    """What one choice got since the last look. logprobs: empty, or one for each token."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish: FinishReason | None


@dataclass(slots=True, eq=False)
class ChoiceQueue:
    """The tokens of one choice that its handler has not taken yet."""

    inbox: Inbox
    index: int  # of the choice in the answer
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    _: KW_ONLY
    received: list[int] = field(default_factory=list)  # all its tokens ever, for a worker that goes on with it
    finish: FinishReason | None = None
    num_cached_tokens: int = 0  # of the prompt, those that the worker did not compute for this choice

    def put(self, token_id: int, finish: FinishReason | None, logprobs: TokenLogprobs | None) -> None:
        """One more token. Too many that nobody takes fail the request."""
        inbox = self.inbox
        token_ids = self.token_ids
        if not token_ids:
            inbox.ready.append(self)
        token_ids.append(token_id)
        self.received.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if finish is not None:
            self.finish = finish
        if len(token_ids) > inbox.max_queued_tokens:
            inbox.fail(
                DeadlineError(
                    f"The client read too slowly: {len(token_ids)} tokens of one choice were waiting for it. Read the "
                    "stream as it comes, or ask without streaming."
                )
            )
        inbox.wake()

    def lose(self, error: LoRAFleetError) -> None:
        """The worker that put tokens here is gone, or has given the choice up for another one."""
        self.inbox.lose(self, error)

    def take(self) -> Arrived:
        """All that is there."""
        arrived = Arrived(self.token_ids, self.logprobs, self.finish)
        self.token_ids, self.logprobs = [], []
        return arrived


class Inbox:
    """The choices of one request together; one reader."""

    __slots__ = ("_error", "_on_fail", "_on_lost", "_waiter", "max_queued_tokens", "ready")

    def __init__(
        self,
        max_queued_tokens: int,
        on_fail: Callable[[], None],
        on_lost: Callable[[ChoiceQueue, LoRAFleetError], None] | None = None,
    ) -> None:
        """on_fail: called once, at the first failure, from `fail`. on_lost: sees to it that another worker goes on
        with a choice; without it a lost worker is a failure."""
        self.max_queued_tokens = max_queued_tokens
        self.ready: list[ChoiceQueue] = []  # those with tokens
        self._on_fail = on_fail
        self._on_lost = on_lost
        self._error: LoRAFleetError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def open_queue(self, index: int) -> ChoiceQueue:
        """A queue for one more choice."""
        return ChoiceQueue(self, index, [], [])

    def fail(self, error: LoRAFleetError) -> None:
        """End the whole request. The reader gets what has arrived so far, then the error. Only the first counts."""
        if self._error is None:
            self._error = error
            self._on_fail()
            self.wake()

    def lose(self, queue: ChoiceQueue, error: LoRAFleetError) -> None:
        """The worker of one choice is gone. Does nothing for a request that has failed."""
        if self._on_lost is None:
            self.fail(error)
        elif self._error is None:
            self._on_lost(queue, error)

    def wake(self) -> None:
        """Let the reader go on, if it waits."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[ChoiceQueue]:
        """The queues that hold tokens, at least one; waits for it. Raises what `fail` was given."""
        while not self.ready:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        ready, self.ready = self.ready, []
        return ready
