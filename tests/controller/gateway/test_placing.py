"""A request's choices on their way: a few at a time, and others' between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from lorafleet.controller.gateway.inbox import Inbox
from lorafleet.controller.gateway.placing import MAX_LOST, Placing, Ticket
from lorafleet.controller.gateway.waiting_line import WaitingLine
from lorafleet.workers.engine.request import GenerateRequest
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.errors import (
    DrainingError,
    InternalError,
    InvalidRequestError,
    LoRAFleetError,
    WorkerLostError,
    WorkerUnavailableError,
)


class Clock:
    """Stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Session:
    """Takes everything; `sent` says when it has been sent."""

    class endpoint:
        worker_id = "w"

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.cancelled: list[int] = []
        self.sent = asyncio.Event()
        self.sent.set()

    def submit(self, queue: Any, request: GenerateRequest) -> int:
        self.requests.append(request)
        return len(self.requests)

    def cancel(self, stream: int) -> None:
        self.cancelled.append(stream)

    async def drained(self) -> None:
        await self.sent.wait()


class Request:
    """One of `num_choices`, whose choices go to `session`, if there is one."""

    def __init__(self, num_choices: int, num_tokens: int = 2, num_seats: int = 0, worker_wait_s: float = 60.0) -> None:
        self.session: Session | None = Session()
        self.line = WaitingLine()
        self.num_seats = num_seats
        self.clock = Clock()
        self.errors: list[LoRAFleetError] = []
        self.num_resumed = 0
        self.placing = Placing(
            request_id="r",
            workers=self,
            worker_wait_s=worker_wait_s,
            fail=self.errors.append,
            on_resumed=self.resumed,
            clock=self.clock,
        )
        inbox = Inbox(9, lambda: None)
        generate = GenerateRequest("r", (7,) * num_tokens, SamplingOptions(max_tokens=64))
        self.tickets = [Ticket(inbox.open_queue(number), generate, number) for number in range(num_choices)]
        for ticket in self.tickets:
            self.placing.add(ticket)

    def choose(self, request: GenerateRequest) -> Any:
        if self.session is None:
            raise WorkerUnavailableError("none")
        return self.session

    def resumed(self) -> None:
        self.num_resumed += 1


async def test_what_is_submitted_is_the_prompt_and_the_choices_number() -> None:
    request = Request(3, num_tokens=4)
    request.placing.start()
    assert request.session is not None
    assert [sent.sampling.choice for sent in request.session.requests] == [0, 1, 2]
    assert all(sent.prompt_token_ids == (7,) * 4 for sent in request.session.requests)
    assert request.placing._task is None, "a small request needs no task"


@pytest.mark.parametrize(
    ("num_choices", "num_tokens", "num_seats", "at_once"),
    [(40, 1, 100, 32), (40, 8192, 100, 2), (40, 1 << 20, 100, 1), (31, 1, 0, 31)],
)
async def test_others_get_between_the_choices_of_a_large_request(
    num_choices: int, num_tokens: int, num_seats: int, at_once: int, eventually: Callable[..., Any]
) -> None:
    request = Request(num_choices, num_tokens, num_seats)
    session = request.session
    assert session is not None
    session.sent.clear()
    request.placing.start()
    assert len(session.requests) == at_once
    if num_choices == at_once:
        return
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(session.requests) <= 2 * at_once, "it does not wait until they are sent"
    session.sent.set()
    await eventually(lambda: len(session.requests) == num_choices)


@pytest.mark.parametrize(("num_seats", "window"), [(0, 32), (8, 32), (64, 128)])
async def test_no_more_choices_are_with_workers_than_they_can_soon_begin(
    num_seats: int, window: int, eventually: Callable[..., Any]
) -> None:
    request = Request(300, num_seats=num_seats)
    session = request.session
    assert session is not None
    request.placing.start()
    await eventually(lambda: len(session.requests) == window)
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(session.requests) == window
    for ticket in request.tickets[:10]:
        request.placing.end(ticket)
    await eventually(lambda: len(session.requests) == window + 10)
    assert session.cancelled == list(range(1, 11))
    request.placing.stop()


async def test_without_a_worker_it_waits_for_news_and_no_longer_than_it_may(eventually: Callable[..., Any]) -> None:
    request = Request(2)
    session, request.session = request.session, None
    request.placing.start()
    await eventually(lambda: len(request.line) == 1)
    request.line.move()  # news, but none of use
    await asyncio.sleep(0)
    await eventually(lambda: len(request.line) == 1)
    request.session = session
    request.line.move()
    assert session is not None
    await eventually(lambda: len(session.requests) == 2)
    assert not request.errors

    late = Request(2)
    late.session = None
    late.placing.start()
    await eventually(lambda: len(late.line) == 1)
    late.clock.now += 60
    late.line.move()
    await eventually(lambda: late.errors)
    assert isinstance(late.errors[0], WorkerUnavailableError)


async def test_a_choice_whose_worker_is_lost_goes_on_with_its_tokens(eventually: Callable[..., Any]) -> None:
    request = Request(1)
    session = request.session
    assert session is not None
    request.placing.start()
    (ticket,) = request.tickets
    for number in range(1, MAX_LOST + 1):
        ticket.queue.received.append(number)
        request.placing.lose(ticket, WorkerLostError("gone"))
        await eventually(lambda number=number: len(session.requests) == number + 1)
        assert list(session.requests[-1].output_token_ids) == list(range(1, number + 1))
    assert request.num_resumed == MAX_LOST
    request.placing.lose(ticket, WorkerLostError("gone again"))
    assert [error.message for error in request.errors] == ["gone again"]


async def test_workers_that_only_ever_give_a_choice_up_are_not_asked_for_ever(eventually: Callable[..., Any]) -> None:
    request = Request(1)
    request.placing.start()
    (ticket,) = request.tickets
    session, request.session = request.session, None
    for _ in range(2):
        request.session = None
        request.placing.lose(ticket, DrainingError("not here"))
        await eventually(lambda: len(request.line) == 1)
        request.clock.now += 40
        request.session = session
        request.line.move()
        if not request.errors:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    request.session = None
    request.placing.lose(ticket, DrainingError("not here"))
    await eventually(lambda: request.errors)
    assert [error.message for error in request.errors] == ["not here"]


async def test_what_none_will_ever_take_is_refused_at_once_and_a_bug_ends_the_request(
    eventually: Callable[..., Any],
) -> None:
    request = Request(1)

    def refuse(generate: GenerateRequest) -> Any:
        raise InvalidRequestError("never")

    request.choose = refuse  # type: ignore[method-assign]
    with pytest.raises(InvalidRequestError):
        request.placing.start()

    broken = Request(1)
    broken.placing.start()

    def fail(generate: GenerateRequest) -> Any:
        raise ZeroDivisionError

    broken.choose = fail  # type: ignore[method-assign]
    broken.placing.lose(broken.tickets[0], WorkerLostError("gone"))
    await eventually(lambda: broken.errors)
    assert isinstance(broken.errors[0], InternalError)
