"""Page hashes, by which requests find keys and values that others have computed.

A page's content depends on all tokens up to its end and on the adapter, and on nothing else. Its hash is a SHA-256 over
the previous page's hash and its own tokens; the chain starts with a root that identifies the owner. Tenant and salt are
part of the root although the content does not depend on them: a fast prompt would reveal that another tenant had sent
it before.

Pages before the start of an activated adapter (activation.py) are the base model's and hashed as such, so they are
shared with it and with other such adapters. The page with the start and all after it are the adapter's.
"""

from __future__ import annotations

from array import array
from hashlib import sha256


def root_hash(tenant: str, cache_salt: str, adapter: str | None) -> bytes:
    """Return the root of a request's hash chain, equal for requests that may share pages."""
    return sha256(repr((tenant, cache_salt, adapter)).encode()).digest()


def parting_hash(adapter: str, start: int) -> bytes:
    """Return the hash that separates an adapter's pages, from its start on, from the base model's. start: above 0.

    It covers the start: the same tokens may be in one request's prompt and in another's output.
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

    parting: goes into the hash of the page that contains token `start`, and thereby into those after it.
    """
    assert num_pages * page_size <= len(token_ids)
    for page in range(len(hashes), num_pages):
        tokens = array("q", token_ids[page * page_size : (page + 1) * page_size])
        before = hashes[-1] if hashes else root
        if page == start // page_size:
            before += parting
        hashes.append(sha256(before + tokens.tobytes()).digest())
