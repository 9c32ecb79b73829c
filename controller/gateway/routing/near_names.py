"""Finds the names most similar to an unknown one, fast among thousands.

A misspelt name usually begins or ends like the right one, so it is compared only with its neighbours in alphabetical
order, read forwards or backwards.
"""

from __future__ import annotations

import bisect
import difflib
import functools
from collections.abc import Iterable, Sequence
from typing import Final

NUM_NEAR: Final = 3
_MAX_CHARS = 128  # the part of a name that is compared
_NUM_NEIGHBOURS = 8  # before and after it, in either order


class NearNames:
    """The index of a set of names; it is sorted at the first call of `of`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names

    def of(self, name: str) -> list[str]:
        """Return at most `NUM_NEAR` names similar to `name`, the most similar first, ignoring case."""
        wanted = name[:_MAX_CHARS].lower()
        ending = name[: -_MAX_CHARS - 1 : -1].lower()
        near = [*_neighbours(wanted, self._forwards), *(found[::-1] for found in _neighbours(ending, self._backwards))]
        compared = {found[:_MAX_CHARS]: found for found in near}
        matches = difflib.get_close_matches(wanted, compared, NUM_NEAR, cutoff=0.5)
        return [self._by_lower[compared[match]] for match in matches]

    @functools.cached_property
    def _by_lower(self) -> dict[str, str]:
        return {name.lower(): name for name in self._names}

    @functools.cached_property
    def _forwards(self) -> list[str]:
        return sorted(self._by_lower)

    @functools.cached_property
    def _backwards(self) -> list[str]:
        return sorted(name[::-1] for name in self._by_lower)


def _neighbours(name: str, names: Sequence[str]) -> Sequence[str]:
    place = bisect.bisect_left(names, name)
    return names[max(0, place - _NUM_NEIGHBOURS) : place + _NUM_NEIGHBOURS]
