"""The other ranks as rank 0 asks for things between steps: they have every adapter's shard in place before it is used.

A load has two phases. First each rank reads, verifies and puts its shard into the slot, which no request uses; then,
when all have, rank 0 says with a step that it counts (`Change.COMMIT`). Until then nothing of it is seen anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch


class Followers(Protocol):
    """Thread-safe. Every call but `prefetch` and `forget` waits until all ranks have answered.

    Raises what one of them refused with, and `InternalError` when one is lost: its group ends then.
    """

    are_none: bool  # a group of one rank

    def register(self, path: Path, digest: str) -> None:
        """Let all know an adapter that rank 0 has verified. Idempotent."""

    def forget(self, digest: str) -> None:
        """No request uses the adapter any more; free its host memory."""

    def prefetch(self, digest: str) -> None:
        """Bring it into the host tiers in the background."""

    def partial_squares(self, path: Path, digest: str) -> Sequence[torch.Tensor]:
        """Each rank's `ModelRunner.partial_squares`."""

    def stage(
        self, path: Path, digest: str, slot: int, number: int, norms_NH: torch.Tensor | None
    ) -> Callable[[], None]:
        """Begin to put an adapter's shards into a slot; returns what waits until all ranks have.

        path: for a rank that has just been told to forget it, while rank 0 was told to register it anew. number: of
        this load; larger than that of any before it for the slot. norms_NH: for `ModelRunner.set_split_norms`, if the
        adapter has such.
        """

    def close(self) -> None:
        """Nobody asks for anything any more."""


class NoFollowers:
    """Of a group of one."""

    are_none = True

    def register(self, path: Path, digest: str) -> None:
        pass

    def forget(self, digest: str) -> None:
        pass

    def prefetch(self, digest: str) -> None:
        pass

    def partial_squares(self, path: Path, digest: str) -> Sequence[torch.Tensor]:
        return ()

    def stage(
        self, path: Path, digest: str, slot: int, number: int, norms_NH: torch.Tensor | None
    ) -> Callable[[], None]:
        return lambda: None

    def close(self) -> None:
        pass
