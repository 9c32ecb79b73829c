"""The KV pages of requests: how many each needs, which are computed already, and the hashes of its own.

Owns: a request's `pages`, `num_hashed_pages`, `prefix_hashes`, and its `num_computed_tokens` where pages come and go.
Leaves to others: free pages (block_pool.py), computing hashes (prefix.py), which requests get pages (scheduler.py).

A request's first pages may have been computed for another request, or for itself before a preemption; then it starts
after them. At least one token is left to compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorafleet.workers.scheduling.block_pool import BlockPool
from lorafleet.workers.scheduling.prefix import extend_hashes
from lorafleet.workers.scheduling.request import Request


class RequestPages:
    """Gives pages of a pool, `page_size` tokens each, to requests and takes them back."""

    def __init__(self, pool: BlockPool, *, page_size: int, enable_prefix_caching: bool) -> None:
        self._pool = pool
        self._page_size = page_size
        self._enable_prefix_caching = enable_prefix_caching

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Return whether a request of `num_tokens` fits when it is alone."""
        return self._num_for(num_tokens) <= self._pool.num_pages

    def num_found_tokens(self, request: Request) -> int:
        """Return how many leading tokens of a waiting request need no computing if it starts now."""
        return len(self._find(request)) * self._page_size

    def place(self, request: Request) -> bool:
        """Give a waiting request pages for all its known tokens, so that no prompt is preempted half way, or none."""
        found = self._find(request)
        pages = self._pool.allocate(self._num_for(request.num_tokens) - len(found), found)
        if pages is None:
            return False
        request.pages = pages
        request.num_hashed_pages = len(found)
        request.num_computed_tokens = len(found) * self._page_size
        return True

    def could_place(self, request: Request, without: Iterable[Request]) -> bool:
        """Return whether a waiting request could have its pages if these running ones released theirs."""
        found = self._find(request)
        num_free = self._pool.num_free_without((other.pages for other in without), set(found))
        return num_free >= self._num_for(request.num_tokens) - len(found)

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give the request pages for its first `num_tokens` tokens, or none."""
        pages = self._pool.allocate(max(0, self._num_for(num_tokens) - len(request.pages)))
        if pages is None:
            return False
        request.pages.extend(pages)
        return True

    def hash_full(self, request: Request, num_tokens: int) -> None:
        """Let other requests find the pages that the first `num_tokens` tokens of a request fill."""
        num_pages = num_tokens // self._page_size
        if num_pages <= request.num_hashed_pages or not self._enable_prefix_caching:
            return
        self._extend_hashes(request, num_pages)
        for number in range(request.num_hashed_pages, num_pages):
            self._pool.set_hash(request.pages[number], request.prefix_hashes[number])
        request.num_hashed_pages = num_pages

    def free(self, request: Request, *, is_spoiled: bool = False) -> None:
        """Take a request's pages back. is_spoiled: their content must not be found again."""
        if is_spoiled:
            self._pool.spoil(request.pages)
        self._pool.free(request.pages)
        request.num_computed_tokens = request.num_hashed_pages = 0

    def _find(self, request: Request) -> list[int]:
        """Return pages that already hold a waiting request's tokens; its last token is left to compute.

        A request that needs log-probabilities of its prompt computes all of it.
        """
        if not self._enable_prefix_caching or request.needs_prompt_logprobs:
            return []
        num_pages = (request.num_tokens - 1) // self._page_size
        if num_pages > len(request.prefix_hashes):
            self._extend_hashes(request, num_pages)
        return self._pool.find(request.prefix_hashes[:num_pages])

    def _extend_hashes(self, request: Request, num_pages: int) -> None:
        extend_hashes(
            request.prefix_hashes,
            request.prefix_root,
            request.token_ids,
            self._page_size,
            num_pages,
            parting=request.prefix_parting,
            start=request.adapter_start,
        )

    def _num_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def check_integrity(self, running: Sequence[Request], waiting: Sequence[Request]) -> None:
        """Check that running requests hold all held pages, each enough, under their own hashes if any. For tests."""
        self._pool.check_integrity(request.pages for request in running)
        for request in running:
            assert request.num_computed_tokens <= len(request.pages) * self._page_size
            for number, page in enumerate(request.pages):
                page_hash = self._pool.hash_of(page)
                assert page_hash is None or (
                    number < request.num_hashed_pages and page_hash == request.prefix_hashes[number]
                )
        assert all(not request.pages and not request.num_computed_tokens for request in waiting)
