"""The queue between worker sessions, which put a request's tokens, and the request's handler, which takes them.

Owns: the bound, and waking the one reader. Leaves to others: the use of the tokens (generation.py).

All of it runs on the event loop's thread, so nothing needs a lock. Sessions only `put`, `fail` and `lose`, which return
at once, so no client can hold up a session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

from lorafleet.workers.errors import DeadlineError, LoRAFleetError
from lorafleet.workers.scheduling.logprobs import PromptLogprobs, TokenLogprobs
from lorafleet.workers.scheduling.request import FinishReason


class Arrived(NamedTuple):
    """The tokens one choice got since the last call. logprobs: empty, or one for each token."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish: FinishReason | None


@dataclass(slots=True, eq=False)
class ChoiceQueue:
    """The tokens of one choice, from its worker session to its handler."""

    inbox: Inbox
    index: int  # the choice's, in the answer
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    _: KW_ONLY
    received: list[int] = field(default_factory=list)  # all its tokens so far, for a worker that resumes it
    finish: FinishReason | None = None
    prompt_logprobs: PromptLogprobs | None = None  # from the second token on, as far as computed
    num_cached_tokens: int = 0  # prompt tokens that the worker did not compute for this choice

    def put(self, token_id: int, finish: FinishReason | None, logprobs: TokenLogprobs | None) -> None:
        """Add one token. Too many that are not taken fail the request."""
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
                    "stream as it arrives, or do not stream."
                )
            )
        inbox.wake()

    def end(self, finish: FinishReason) -> None:
        """End the choice without another token."""
        if not self.token_ids:
            self.inbox.ready.append(self)
        self.finish = finish
        self.inbox.wake()

    def add_prompt_logprobs(self, more: PromptLogprobs) -> None:
        """Add those of the next prompt tokens."""
        if self.prompt_logprobs is None:
            self.prompt_logprobs = more
        else:
            self.prompt_logprobs.extend(more)

    def lose(self, error: LoRAFleetError) -> None:
        """Report that the choice's worker is lost, or has given the choice up to another one."""
        self.inbox.lose(self, error)

    def take(self) -> Arrived:
        """Take all tokens."""
        arrived = Arrived(self.token_ids, self.logprobs, self.finish)
        self.token_ids, self.logprobs = [], []
        return arrived


class Inbox:
    """The queues of one request's choices, with one reader."""

    __slots__ = ("_error", "_on_fail", "_on_lost", "_waiter", "max_queued_tokens", "ready")

    def __init__(
        self,
        max_queued_tokens: int,
        on_fail: Callable[[], None],
        on_lost: Callable[[ChoiceQueue, LoRAFleetError], None] | None = None,
    ) -> None:
        """on_fail: called once, at the first failure, from `fail`. on_lost: has another worker resume a choice; without
        it a lost worker is a failure."""
        self.max_queued_tokens = max_queued_tokens
        self.ready: list[ChoiceQueue] = []  # those with tokens
        self._on_fail = on_fail
        self._on_lost = on_lost
        self._error: LoRAFleetError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def open_queue(self, index: int) -> ChoiceQueue:
        """Return the queue of one more choice."""
        return ChoiceQueue(self, index, [], [])

    def fail(self, error: LoRAFleetError) -> None:
        """End the whole request. The reader gets what has arrived so far, then the error. Only the first counts."""
        if self._error is None:
            self._error = error
            self._on_fail()
            self.wake()

    def lose(self, queue: ChoiceQueue, error: LoRAFleetError) -> None:
        """Report that the worker of one choice is lost. Does nothing for a request that has failed."""
        if self._on_lost is None:
            self.fail(error)
        elif self._error is None:
            self._on_lost(queue, error)

    def wake(self) -> None:
        """Wake the reader if it waits."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[ChoiceQueue]:
        """Wait until a queue holds tokens or has ended, and return all that do. Raises the error given to `fail`."""
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
