"""The pages of the KV cache as numbers: who may write where. The memory itself is model/kv_cache.py's."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """A fixed number of pages, each free or held by exactly one request."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # A stack: the page freed last is handed out first, while its memory is still in the caches.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_pages: int) -> list[int] | None:
        """`num_pages` pages, or None (and nothing taken) when there are fewer."""
        if num_pages > len(self._free):
            return None
        if num_pages == 0:
            return []
        pages = self._free[-num_pages:]
        del self._free[-num_pages:]
        return pages

    def free(self, pages: list[int]) -> None:
        """Take back pages; the caller's list is emptied, so that nothing can be freed twice through it."""
        self._free.extend(reversed(pages))
        pages.clear()

    def check_integrity(self, holders: Iterable[list[int]]) -> None:
        """Every page is free or in exactly one holder's list. For tests."""
        seen = list(self._free)
        for pages in holders:
            seen.extend(pages)
        assert sorted(seen) == list(range(self.num_pages)), f"{len(seen)} pages accounted for of {self.num_pages}"
