"""Submits one request's choices to workers: a few at a time, again when a worker is lost, waiting while no worker can.

Owns: when a choice is submitted. Leaves to others: the choice of worker (pool.py), what comes back (generation.py).

However many choices a request has, workers hold no more of them than they can start soon. After each batch it waits
until the batch is sent, so that others' requests are interleaved.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Final, Protocol

from lorafleet.controller.gateway.streams.inbox import ChoiceQueue
from lorafleet.controller.gateway.streams.session import WorkerSession
from lorafleet.controller.gateway.streams.waiting_line import WaitingLine
from lorafleet.workers.errors import (
    AdapterUnavailableError,
    InternalError,
    LoRAFleetError,
    WorkerLostError,
    WorkerUnavailableError,
)
from lorafleet.workers.scheduling.request import GenerateRequest

MAX_LOST: Final = 3  # workers that one choice may lose
_MIN_WINDOW: Final = 32  # choices of one request that workers may hold
_SEATS_AHEAD: Final = 2  # times the seats of all workers, if that is more
_BATCH_CHOICES: Final = 32  # choices submitted without a pause
_BATCH_TOKENS: Final = 16_384  # their prompt tokens

logger = logging.getLogger(__name__)


class Workers(Protocol):
    """The workers that take choices."""

    line: WaitingLine  # of choices that no worker could take

    @property
    def num_seats(self) -> int:
        """Return the number of seats of all workers that take requests."""

    def choose(self, request: GenerateRequest) -> WorkerSession:
        """Return the session for a request. Raises WorkerUnavailableError, or why no worker will ever take it."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One choice on its way to a worker."""

    queue: ChoiceQueue
    request: GenerateRequest  # shared by all choices of the prompt
    number: int  # index of the choice among the prompt's
    _: KW_ONLY
    session: WorkerSession | None = None  # that has the choice
    stream: int = 0  # in that session
    num_lost: int = 0  # workers lost so far
    error: LoRAFleetError | None = None  # of the worker that was lost last
    give_up_at: float | None = None  # time at which its wait ends; None while it progresses
    is_over: bool = False


class Placing:
    """The choices of one request: `add` them, then `start`."""

    def __init__(
        self,
        *,
        request_id: str,
        workers: Workers,
        worker_wait_s: float,
        fail: Callable[[LoRAFleetError], None],
        on_resumed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """worker_wait_s: maximum wait of a choice for a worker. fail: ends the request. on_resumed: called when a
        worker resumes a choice after another was lost."""
        self._request_id = request_id
        self._workers = workers
        self._worker_wait_s = worker_wait_s
        self._fail = fail
        self._on_resumed = on_resumed
        self._clock = clock
        self._left: deque[Ticket] = deque()  # still to be submitted
        self._window = _MIN_WINDOW
        self.num_placed = 0  # choices on workers
        self._has_room = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def add(self, ticket: Ticket) -> None:
        """Add a choice."""
        self._left.append(ticket)

    def start(self) -> None:
        """Submit the first choices; the others follow by themselves. Raises the error of one that no worker takes."""
        self._window = max(_MIN_WINDOW, _SEATS_AHEAD * self._workers.num_seats)
        with contextlib.suppress(WorkerUnavailableError):  # the choice waits
            self._submit_some()
        self._go_on()

    def lose(self, ticket: Ticket, error: LoRAFleetError) -> None:
        """Submit again a choice whose worker was lost or has given it up for another worker."""
        ticket.session = None
        ticket.error = error
        self.num_placed -= 1
        ticket.num_lost += isinstance(error, WorkerLostError)
        if ticket.num_lost > MAX_LOST:  # the choice may be what kills them
            self._fail(error)
            return
        self._left.appendleft(ticket)
        self._has_room.set()
        self._go_on()

    def end(self, ticket: Ticket) -> None:
        """Record that a choice needs no more tokens."""
        ticket.is_over = True
        if ticket.session is not None:
            ticket.session.cancel(ticket.stream)
            ticket.session = None
            self.num_placed -= 1
            self._has_room.set()

    def stop(self) -> None:
        """Submit nothing more."""
        self._left.clear()
        if self._task is not None:
            self._task.cancel()

    def _go_on(self) -> None:
        if self._left and self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"placing {self._request_id}")

    async def _run(self) -> None:
        try:
            await self._submit_all()
        except LoRAFleetError as refused:
            self._fail(refused)
        except Exception as error:  # a bug of ours must not leave the client waiting
            logger.exception("request %s cannot be placed", self._request_id)
            self._fail(InternalError(f"{type(error).__name__} while the request was given to a worker."))
        finally:
            self._task = None

    async def _submit_all(self) -> None:
        while self._left:
            if self.num_placed >= self._window:
                self._has_room.clear()
                await self._has_room.wait()
                continue
            try:
                session = self._submit_some()
            except (WorkerUnavailableError, AdapterUnavailableError) as unavailable:
                await self._wait(self._left[0], unavailable)
            else:
                if session is not None:
                    await session.drained()

    async def _wait(self, ticket: Ticket, unavailable: LoRAFleetError) -> None:
        now = self._clock()
        if ticket.give_up_at is None:
            ticket.give_up_at = now + self._worker_wait_s
        try:
            if ticket.give_up_at <= now:
                raise TimeoutError
            await self._workers.line.wait(ticket.give_up_at - now)
        except TimeoutError:
            raise (ticket.error or unavailable) from None

    def _submit_some(self) -> WorkerSession | None:
        """Submit what may be sent now without a pause. Return the session that got the last choice; None for none."""
        session: WorkerSession | None = None
        request: GenerateRequest | None = None
        num_tokens = 0
        for _ in range(min(_BATCH_CHOICES, len(self._left), max(0, self._window - self.num_placed))):
            ticket = self._left[0]
            if not ticket.is_over:
                if session is None or ticket.request is not request:
                    request = ticket.request
                    session = self._workers.choose(request)
                self._submit(ticket, session)
                num_tokens += len(ticket.request.prompt_token_ids) + len(ticket.queue.received)
            self._left.popleft()
            if num_tokens >= _BATCH_TOKENS:
                break
        return session

    def _submit(self, ticket: Ticket, session: WorkerSession) -> None:
        if not ticket.queue.received:  # another worker may have computed a part of the prompt
            ticket.queue.prompt_logprobs = None
        request = ticket.request.of_choice(ticket.number, ticket.queue.received)
        ticket.stream = session.submit(ticket.queue, request)
        ticket.session = session
        self.num_placed += 1
        if ticket.num_lost:
            self._on_resumed()
            logger.info(
                "request %s: resumed by worker %s after %d tokens",
                self._request_id,
                session.endpoint.worker_id,
                len(ticket.queue.received),
            )
