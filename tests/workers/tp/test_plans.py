"""Plans go from rank 0 to the others whole and in order, whatever their size."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lorafleet.workers.tp.group import Rendezvous
from lorafleet.workers.tp.plans import _FIRST_WORDS, Change, PlanChannel


def channels(size: int) -> list[PlanChannel]:
    """Of ranks that are threads."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def connect(rank: int) -> PlanChannel:
        rendezvous = Rendezvous(
            "127.0.0.1", port, rank=rank, size=size, timeout_s=30.0, listener=listener if rank == 0 else None
        )
        _, plans = rendezvous.connect(torch.device("cpu"))
        return PlanChannel(plans)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(connect, range(size)))


def test_every_rank_receives_each_plan_as_it_was_sent() -> None:
    first, *others = channels(3)
    changes = [(Change.COMMIT, 7), (Change.CLEAR, 2)]
    sizes = [1, 100, _FIRST_WORDS - 5, _FIRST_WORDS, 3 * _FIRST_WORDS, 0]

    def send() -> None:
        for number, size in enumerate(sizes):
            first.send(changes[: number % 3], np.arange(size, dtype=np.int32))
        first.end()

    sender = threading.Thread(target=send)
    sender.start()
    with ThreadPoolExecutor(len(others)) as pool:
        received = list(pool.map(lambda channel: [channel.receive() for _ in range(len(sizes) + 1)], others))
    sender.join()
    for plans in received:
        assert plans.pop() is None
        for number, (plan, size) in enumerate(zip(plans, sizes, strict=True)):
            assert plan is not None
            assert plan.changes == changes[: number % 3]
            assert plan.step.tolist() == list(range(size))


def test_a_rank_that_does_not_come_is_waited_for_so_long() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    rendezvous = Rendezvous("127.0.0.1", listener.getsockname()[1], rank=0, size=2, timeout_s=0.2, listener=listener)
    with pytest.raises(RuntimeError):
        rendezvous.get("what nobody puts")
