"""The queue between sessions and a request's handler."""

from __future__ import annotations

import asyncio

import pytest

from lorafleet.controller.gateway.streams.inbox import Inbox
from lorafleet.workers.errors import DeadlineError, InternalError, WorkerLostError
from lorafleet.workers.scheduling.request import FinishReason


async def test_queued_tokens_are_taken_at_once() -> None:
    inbox = Inbox(10, lambda: None)
    first, second = inbox.open_queue(0), inbox.open_queue(1)
    for token_id in (5, 6):
        first.put(token_id, None, None)
    second.put(7, FinishReason.LENGTH, None)
    assert await inbox.take() == [first, second]
    assert first.take().token_ids == [5, 6]
    assert second.take() == ([7], [], FinishReason.LENGTH)


async def test_a_waiting_reader_is_woken() -> None:
    inbox = Inbox(10, lambda: None)
    queue = inbox.open_queue(0)
    reader = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    assert not reader.done()
    queue.put(5, None, None)
    assert await reader == [queue]


async def test_a_failure_comes_after_what_had_arrived_and_only_once() -> None:
    calls: list[None] = []
    inbox = Inbox(10, lambda: calls.append(None))
    queue = inbox.open_queue(0)
    queue.put(5, None, None)
    inbox.fail(WorkerLostError("first"))
    inbox.fail(InternalError("second"))
    assert await inbox.take() == [queue]
    with pytest.raises(WorkerLostError, match="first"):
        await inbox.take()
    assert len(calls) == 1


async def test_a_reader_that_waits_gets_the_failure() -> None:
    inbox = Inbox(10, lambda: None)
    reader = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.fail(WorkerLostError("gone"))
    with pytest.raises(WorkerLostError):
        await reader


async def test_too_many_tokens_that_are_not_taken_fail_the_request() -> None:
    calls: list[None] = []
    inbox = Inbox(2, lambda: calls.append(None))
    queue = inbox.open_queue(0)
    for token_id in range(3):
        queue.put(token_id, None, None)
    assert len(calls) == 1
    assert (await inbox.take())[0].take().token_ids == [0, 1, 2]
    with pytest.raises(DeadlineError, match="too slowly"):
        await inbox.take()
