"""The pages of the KV cache as numbers: their holders and contents. The memory belongs to model/kv_cache.py.

A page is held by any number of requests, or free. A full page may have a hash (prefix.py). A freed page keeps its hash
and content until it is handed out as an empty one, so it may be found and held again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence, Set


class BlockPool:
    """A fixed number of pages. A page is never written while it has a hash."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._num_holders = [0] * num_pages
        self._hashes: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        # In the order in which they are handed out. Pages without a hash come first, the one freed last before the
        # others, while its memory is still in the caches; then hashed ones, least recently used first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))

    @property
    def num_free(self) -> int:
        """Return the number of pages that no request holds, hashed ones included."""
        return len(self._free)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest prefix of `hashes` in the pool."""
        pages = []
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def allocate(self, num_pages: int, shared: Sequence[int] = ()) -> list[int] | None:
        """Hold the pages found (`shared`) and `num_pages` empty ones, or nothing and return None if there are fewer."""
        if num_pages > len(self._free) - sum(page in self._free for page in shared):
            return None
        for page in shared:
            if not self._num_holders[page]:
                del self._free[page]
            self._num_holders[page] += 1
        pages = list(shared)
        for _ in range(num_pages):
            page, _ = self._free.popitem(last=False)
            self._forget(page)
            self._num_holders[page] = 1
            pages.append(page)
        return pages

    def free(self, pages: list[int]) -> None:
        """Release pages. The caller's list is emptied, so that nothing can be freed twice through it."""
        for page in reversed(pages):  # a later page is useful only together with the earlier ones
            self._num_holders[page] -= 1
            if not self._num_holders[page]:
                self._free[page] = None
                if self._hashes[page] is None:
                    self._free.move_to_end(page, last=False)
        pages.clear()

    def set_hash(self, page: int, page_hash: bytes) -> None:
        """Set the hash of a full, held page. If another page has the hash, this one stays without."""
        assert self._num_holders[page] and self._hashes[page] in (None, page_hash)
        if self._page_of.setdefault(page_hash, page) == page:
            self._hashes[page] = page_hash

    def spoil(self, pages: Iterable[int]) -> None:
        """Remove the pages' hashes, so that no request finds them any more."""
        for page in pages:
            self._forget(page)

    def num_free_without(self, holders: Iterable[Sequence[int]], but: Set[int]) -> int:
        """Return how many pages, not counting `but`, would be free if these holders released theirs."""
        released = Counter(page for pages in holders for page in pages)
        freed = sum(num == self._num_holders[page] and page not in but for page, num in released.items())
        return freed + len(self._free) - sum(page in self._free for page in but)

    def _forget(self, page: int) -> None:
        page_hash = self._hashes[page]
        if page_hash is not None:
            del self._page_of[page_hash]
            self._hashes[page] = None

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Check that each page has as many holders as counted, no hash has two pages, and hashed pages are handed out
        last. For tests."""
        held = Counter(page for pages in holders for page in pages)
        assert [held[page] for page in range(self.num_pages)] == self._num_holders
        assert self._free.keys() == {page for page in range(self.num_pages) if not held[page]}
        hashed = {page: page_hash for page, page_hash in enumerate(self._hashes) if page_hash is not None}
        assert self._page_of == {page_hash: page for page, page_hash in hashed.items()} and len(self._page_of) == len(
            hashed
        )
        has_hash = [page in hashed for page in self._free]
        assert has_hash == sorted(has_hash)

    def hash_of(self, page: int) -> bytes | None:
        """Return a page's hash. For tests."""
        return self._hashes[page]
