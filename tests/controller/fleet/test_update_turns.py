"""Updates wait only for others of their name, and not without bound."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from lorafleet.controller.fleet import update_turns
from lorafleet.controller.fleet.update_turns import UpdateTurns
from lorafleet.workers.errors import AdapterConflictError, QueueFullError


async def test_one_name_is_changed_once_at_a_time_and_others_in_parallel() -> None:
    turns = UpdateTurns()
    order: list[str] = []

    async def change(name: str, until: asyncio.Event) -> None:
        async with turns.of(name, takes_place=True):
            order.append(f"{name} begins")
            await until.wait()
            order.append(f"{name} ends")

    now, later = asyncio.Event(), asyncio.Event()
    now.set()
    slow = asyncio.create_task(change("a", later))
    await asyncio.sleep(0)
    second = asyncio.create_task(change("a", now))
    await change("b", now)
    assert order == ["a begins", "b begins", "b ends"]
    later.set()
    await asyncio.gather(slow, second)
    assert order[3:] == ["a ends", "a begins", "a ends"]


async def test_the_number_of_waiting_updates_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_turns, "MAX_OF_NAME", 2)
    monkeypatch.setattr(update_turns, "MAX_UPDATES", 3)
    turns = UpdateTurns()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(turns.of("a", takes_place=False))
        waiting = asyncio.create_task(stack.enter_async_context(turns.of("a", takes_place=False)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="2 of 'a'"):
            async with turns.of("a", takes_place=False):
                pass
        await stack.enter_async_context(turns.of("b", takes_place=False))
        with pytest.raises(QueueFullError, match="3 in all"):
            async with turns.of("c", takes_place=False):
                pass
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        async with turns.of("c", takes_place=False):
            pass


async def test_a_load_waits_for_a_place_and_is_refused_if_none_becomes_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_turns, "MAX_SIDE_BY_SIDE", 1)
    monkeypatch.setattr(update_turns, "TURN_S", 0.01)
    turns = UpdateTurns()
    async with turns.of("a", takes_place=True):
        with pytest.raises(AdapterConflictError, match="1 other adapters"):
            async with turns.of("b", takes_place=True):
                pass
        async with turns.of("b", takes_place=False):
            pass  # an unload takes none
    async with turns.of("b", takes_place=True):
        pass
