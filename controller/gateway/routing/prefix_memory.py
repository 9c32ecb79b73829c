"""What the beginnings of prompts were that a worker has computed, as far as the gateway knows: it sent them there.

The worker finds them among its KV pages (workers/scheduling/prefix.py) unless it had to give those away meanwhile,
which the gateway does not hear of; so as many tokens are remembered as the worker has room for, those longest unused go
first. A hash stands for all tokens up to the end of a block and for whom they were computed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 64  # tokens


def prefix_hashes(owner: str, token_ids: Sequence[int]) -> list[bytes]:
    """A hash for each whole number of blocks that a prompt begins with, shortest first.

    owner: whose results it may share: the tenant, its cache salt and the adapters.
    """
    digest = hashlib.blake2b(owner.encode(), digest_size=8)
    hashes = []
    for end in range(BLOCK, len(token_ids) + 1, BLOCK):
        digest.update(array("I", token_ids[end - BLOCK : end]))
        hashes.append(digest.digest())
    return hashes


class PrefixMemory:
    """Of one worker."""

    def __init__(self) -> None:
        self._hashes: OrderedDict[bytes, None] = OrderedDict()  # the longest unused first

    def note(self, hashes: Sequence[bytes], max_tokens: int) -> None:
        """A prompt was sent to the worker. max_tokens: that the worker has room for."""
        for page_hash in reversed(hashes):  # of one prompt the longest prefix goes first
            self._hashes[page_hash] = None
            self._hashes.move_to_end(page_hash)
        while len(self._hashes) * BLOCK > max_tokens:
            self._hashes.popitem(last=False)

    def num_found(self, hashes: Sequence[bytes]) -> int:
        """With how many tokens of a prompt the worker need not begin anew."""
        num_blocks = 0
        for page_hash in hashes:
            if page_hash not in self._hashes:
                break
            num_blocks += 1
        return num_blocks * BLOCK

    def clear(self) -> None:
        """The worker has lost all it had."""
        self._hashes.clear()
