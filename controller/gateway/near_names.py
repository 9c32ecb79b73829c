"""Names that look like one that is not there, found in little time among thousands.

A name with a mistake still begins or ends as the right one does, so only those are compared that come next to it in the
alphabet, read forwards or backwards.
"""

from __future__ import annotations

import bisect
import difflib
import functools
from collections.abc import Iterable
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
        near: dict[str, str] = {}
        for key, names in ((wanted, self._forwards), (_backwards(name), self._backwards)):
            place = bisect.bisect_left(names, (key, ""))
            for _, found in names[max(0, place - _NUM_NEIGHBOURS) : place + _NUM_NEIGHBOURS]:
                near.setdefault(found[:_MAX_CHARS].lower(), found)
        return [near[match] for match in difflib.get_close_matches(wanted, near, NUM_NEAR, cutoff=0.5)]

    @functools.cached_property
    def _forwards(self) -> list[tuple[str, str]]:
        return sorted((name[:_MAX_CHARS].lower(), name) for name in self._names)

    @functools.cached_property
    def _backwards(self) -> list[tuple[str, str]]:
        return sorted((_backwards(name), name) for name in self._names)


def _backwards(name: str) -> str:
    return name[: -_MAX_CHARS - 1 : -1].lower()
