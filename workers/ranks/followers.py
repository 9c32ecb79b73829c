"""Rank 0's requests to the other ranks between steps, so that each has its shard of an adapter in place in time.

A load has two phases. First each rank reads, verifies and copies its shard into the slot, which no request uses. When
all have, rank 0 commits the load together with a step (`Change.COMMIT`). Until then it is visible nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch


class Followers(Protocol):
    """Thread-safe. Every call but `prefetch` and `forget` waits until all ranks have answered.

    Raises the first error among the answers, and `InternalError` if a rank is lost; the group then ends.
    """

    are_none: bool  # a group of one rank

    def register(self, path: Path, digest: str) -> None:
        """Register an adapter that rank 0 has verified on all ranks. Idempotent."""

    def forget(self, digest: str) -> None:
        """Free the host memory of an adapter that no request uses any more."""

    def prefetch(self, digest: str) -> None:
        """Load it into the host tiers in the background."""

    def partial_squares(self, path: Path, digest: str) -> Sequence[torch.Tensor]:
        """Return each rank's `ModelRunner.partial_squares`."""

    def stage(
        self, path: Path, digest: str, slot: int, number: int, norms_NH: torch.Tensor | None
    ) -> Callable[[], None]:
        """Begin to copy an adapter's shards into a slot; return a function that waits until all ranks have.

        path: for a rank that was just told to forget the adapter while rank 0 registered it again. number: the load's;
        larger than any earlier one for the slot. norms_NH: for `ModelRunner.set_split_norms`, if the adapter has such
        norms.
        """

    def close(self) -> None:
        """Close the connections. No call may follow."""


class NoFollowers:
    """The followers of a group of one: none."""

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
