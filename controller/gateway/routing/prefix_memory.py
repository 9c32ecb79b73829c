"""The prompt prefixes that a worker has probably cached, because the gateway sent them there.

The worker finds them among its KV pages (workers/scheduling/prefix.py) unless it has evicted those, which the gateway
is not told. So we remember as many tokens as the worker has room for, and drop the least recently used. A hash stands
for all tokens up to the end of a block, and for the owner they were computed for.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 64  # tokens


def prefix_hashes(owner: str, token_ids: Sequence[int]) -> list[bytes]:
    """Return a hash for each prefix of whole blocks of a prompt, shortest first.

    owner: with whom it may share results: the tenant, its cache salt and the adapters.
    """
    digest = hashlib.blake2b(owner.encode(), digest_size=8)
    hashes = []
    for end in range(BLOCK, len(token_ids) + 1, BLOCK):
        digest.update(array("I", token_ids[end - BLOCK : end]))
        hashes.append(digest.digest())
    return hashes


class PrefixMemory:
    """The prefixes of one worker."""

    def __init__(self) -> None:
        self._hashes: OrderedDict[bytes, None] = OrderedDict()  # the least recently used first

    def note(self, hashes: Sequence[bytes], max_tokens: int) -> None:
        """Remember a prompt that was sent to the worker. max_tokens: the worker's room, in tokens."""
        for page_hash in reversed(hashes):  # so that a prompt's longest prefix is dropped first
            self._hashes[page_hash] = None
            self._hashes.move_to_end(page_hash)
        while len(self._hashes) * BLOCK > max_tokens:
            self._hashes.popitem(last=False)

    def num_found(self, hashes: Sequence[bytes]) -> int:
        """Return how many leading tokens of a prompt the worker has probably cached."""
        num_blocks = 0
        for page_hash in hashes:
            if page_hash not in self._hashes:
                break
            num_blocks += 1
        return num_blocks * BLOCK

    def clear(self) -> None:
        """Forget everything: the worker has lost its cache."""
        self._hashes.clear()
