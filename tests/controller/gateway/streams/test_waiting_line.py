"""Waiting for a worker without polling."""

from __future__ import annotations

import asyncio

import pytest

from lorafleet.controller.gateway.streams.waiting_line import WaitingLine


async def test_waiting_requests_are_woken_in_order_a_few_at_a_time_and_later_ones_stay() -> None:
    line, woken, ticks = WaitingLine(), list[int](), list[int]()

    async def wait(number: int) -> None:
        await line.wait(60)
        woken.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(100)]
    await asyncio.sleep(0)
    line.move()
    late = asyncio.create_task(wait(-1))
    while len(woken) < 100:
        await asyncio.sleep(0)  # another's turn of the loop
        ticks.append(len(woken))
    assert woken == list(range(100))
    assert len(set(ticks)) > 4, "others had no turn"
    await asyncio.gather(*tasks)
    assert len(line) == 1
    line.move()
    await late


async def test_cancelled_and_timed_out_requests_are_forgotten() -> None:
    line = WaitingLine()
    gone = asyncio.create_task(line.wait(60))
    other = asyncio.create_task(line.wait(60))
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(TimeoutError):
        await line.wait(0.01)
    assert len(line) == 1
    line.move()
    line.move()
    await other
    assert not len(line)
    line.move()


async def test_nothing_runs_while_all_wait() -> None:
    """A thousand waiting requests cost nothing: the loop is idle."""
    line = WaitingLine()
    tasks = [asyncio.create_task(line.wait(60)) for _ in range(1000)]
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    await asyncio.sleep(0.01)
    assert not loop._ready  # type: ignore[attr-defined]
    line.move()
    await asyncio.gather(*tasks)
