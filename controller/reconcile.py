"""Desired against observed workers: what to do next. Pure, tested as a table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Actions:
    """Worker names."""

    create: tuple[str, ...]
    remove: tuple[str, ...]


def reconcile(desired: Sequence[str], observed: Collection[str]) -> Actions:
    """Workers that are wanted and missing, in wanted order, and workers that exist unwanted, sorted."""
    return Actions(
        create=tuple(name for name in desired if name not in observed),
        remove=tuple(sorted(set(observed) - set(desired))),
    )
