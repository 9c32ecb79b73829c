"""Stop strings in a stream of text.

Owns: finding them across pushes, and holding back text that may still become one. Leaves to others: tokens (output.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafleet.workers.errors import InvalidRequestError


class StopMatcher:
    """Releases text up to the first stop string.

    The match completed first wins, as if the text arrived character by character. Of several completed at the same
    character the longest wins, so that no part of a stop string is released. Hence the result does not depend on how
    the text is split into pushes. (vLLM also takes the first to be completed, but within one token it uses the list's
    order.)
    """

    __slots__ = ("_first_chars", "_held", "_include", "_matched", "_num_immune", "_stops")

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        """Raises InvalidRequestError for an empty stop string, which would match everywhere."""
        if not all(stop):
            raise InvalidRequestError("A stop string must not be empty.", param="stop")
        self._stops = tuple(dict.fromkeys(stop))
        self._first_chars = frozenset(string[0] for string in self._stops)
        self._include = include_stop_str_in_output
        self._held = ""  # the longest suffix of the text that is a prefix of a stop string
        self._num_immune = 0  # a stop string must end after this many characters of `_held`
        self._matched: str | None = None

    def push(self, text: str, matchable: bool = True) -> tuple[str, str | None]:
        """Add text; return (text that is safe to release, the stop string found or None).

        With `matchable` false no stop string may end in `text`, but one may begin there. After a match nothing more is
        released.
        """
        if self._matched is not None:
            return "", self._matched
        if self._held:
            text = self._held + text
        elif self._first_chars.isdisjoint(text):
            return text, None
        if matchable:
            found = self._find(text)
            if found is not None:
                begin, self._matched = found
                self._held = ""
                return text[: begin + len(self._matched) if self._include else begin], self._matched
        num_safe = len(text)
        for stop in self._stops:
            begin = text.find(stop[0], max(0, len(text) - len(stop) + 1), num_safe)
            while begin >= 0:
                if stop.startswith(text[begin:]):
                    num_safe = begin
                    break
                begin = text.find(stop[0], begin + 1, num_safe)
        # The rest of `text` has been searched: a match that ends within it was found, or must not count.
        self._held = text[num_safe:]
        self._num_immune = len(self._held)
        return text[:num_safe], None

    def finish(self) -> str:
        """End the text; return what was held back, since it did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, str] | None:
        """Return (begin, stop string) of the match that ends first, the longest of those."""
        best: tuple[int, int] | None = None  # (end, begin): the smallest wins
        best_stop = ""
        for stop in self._stops:
            begin = text.find(stop, max(0, self._num_immune - len(stop) + 1))
            if begin >= 0 and (best is None or (begin + len(stop), begin) < best):
                best, best_stop = (begin + len(stop), begin), stop
        return None if best is None else (best[1], best_stop)
