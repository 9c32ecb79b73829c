"""Names that look like one that is not there, found in little time among thousands.

A name with a mistake still begins or ends as the right one does, so only those are compared that come next to it in the
alphabet, read forwards or backwards.
"""

from __future__ import annotations

import bisect
import difflib
import functools
from collections.abc import Iterable, Sequence
from typing import Final

NUM_NEAR: Final = 3
_MAX_CHARS = 128  # of a name, those that are compared
_NUM_NEIGHBOURS = 8  # before and after it, in either alphabet


class NearNames:
    """Of a set of names; nothing is sorted before the first question."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names

    def of(self, name: str) -> list[str]:
        """At most `NUM_NEAR` names that look like `name`, the likest first; case does not matter."""
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
