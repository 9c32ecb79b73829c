"""What a full page is called: the hashes under which requests find the keys and values that others have computed.

A page's content depends on all tokens up to its end, on the adapter, and on nothing else. Its hash is a SHA-256 over
the hash of the page before it and its own tokens; the chain begins with a root that says whose content it is. Tenants
and salts are in the root although the content does not depend on them: whether a prompt is computed fast tells that
somebody sent it before, and that is not for others to learn.

The pages before the place where an activated adapter begins (activation.py) are the base model's and hashed as such, so
that they are shared with it and with other such adapters. The page of that place and all behind it are the adapter's.
"""

from __future__ import annotations

from array import array
from hashlib import sha256


def root_hash(tenant: str, cache_salt: str, adapter: str | None) -> bytes:
    """What a request's pages have in common with those that it may share."""
    return sha256(repr((tenant, cache_salt, adapter)).encode()).digest()


def parting_hash(adapter: str, start: int) -> bytes:
    """What tells the pages of an adapter that begins at `start`, greater than 0, from the base model's.

    The place is part of it: tokens that one request has in its prompt, another may have in its output.
    """
    return sha256(repr((adapter, start)).encode()).digest()


def extend_hashes(
    hashes: list[bytes],
    root: bytes,
    token_ids: list[int],
    page_size: int,
    num_pages: int,
    *,
    parting: bytes = b"",
    start: int = 0,
) -> None:
    """Append the hashes of the pages of `token_ids` until there are `num_pages`, all of which must be full.

    parting: goes into the hash of the page that token `start` is in, and so into those behind it.
    """
    assert num_pages * page_size <= len(token_ids)
    for page in range(len(hashes), num_pages):
        tokens = array("q", token_ids[page * page_size : (page + 1) * page_size])
        before = hashes[-1] if hashes else root
        if page == start // page_size:
            before += parting
        hashes.append(sha256(before + tokens.tobytes()).digest())
