"""Rank 0's messages before each step: changes of slots, and the step's input as numbers. No pickle.

One broadcast holds a decode step of a few dozen requests; a larger step takes a second one.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

_FIRST_WORDS = 2048  # 8 KiB
_NUM_HEADER = 3

Words = npt.NDArray[np.int32]


class Change(IntEnum):
    """A change of a slot between two steps. Each comes with a number."""

    COMMIT = 0  # the number is a load's: its staged shard is used from this step on
    CLEAR = 1  # the number is a slot's: free its adapter's weights outside the slot


class Plan(NamedTuple):
    changes: list[tuple[Change, int]]  # in order
    step: Words  # as `StepBuffers.pack` made it


class PlanChannel:
    """Rank 0 sends, all others receive each message once and in order. A rank that dies ends the channel for all."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._first = torch.zeros(_FIRST_WORDS, dtype=torch.int32)

    def send(self, changes: Sequence[tuple[Change, int]], step: Words) -> None:
        """Send a plan. Raises `RuntimeError` if a rank is lost."""
        flat = np.array(changes, np.int32).reshape(-1)
        body = np.concatenate([flat, step])
        self._send((1, len(flat), len(step)), body)

    def end(self) -> None:
        """Announce that no more plans will come. Raises `RuntimeError` if a rank is lost."""
        self._send((0, 0, 0), np.zeros(0, np.int32))

    def receive(self) -> Plan | None:
        """Return the next plan; None: there will be no more. Raises `RuntimeError` if rank 0 is lost."""
        self._broadcast(self._first)
        words = self._first.numpy()
        goes_on, num_changes, num_step = words[:_NUM_HEADER].tolist()
        if not goes_on:
            return None
        size = num_changes + num_step
        body = words[_NUM_HEADER : _NUM_HEADER + size].copy()
        if len(body) < size:
            rest = torch.empty(size - len(body), dtype=torch.int32)
            self._broadcast(rest)
            body = np.concatenate([body, rest.numpy()])
        pairs = body[:num_changes].reshape(-1, 2).tolist()
        return Plan([(Change(change), number) for change, number in pairs], body[num_changes:])

    def _send(self, header: tuple[int, int, int], body: Words) -> None:
        words = self._first.numpy()
        words[:_NUM_HEADER] = header
        inline = body[: _FIRST_WORDS - _NUM_HEADER]
        words[_NUM_HEADER : _NUM_HEADER + len(inline)] = inline
        self._broadcast(self._first)
        if len(inline) < len(body):
            self._broadcast(torch.from_numpy(body[len(inline) :].copy()))

    def _broadcast(self, words: torch.Tensor) -> None:
        self._group.broadcast([words], dist.BroadcastOptions()).wait()
