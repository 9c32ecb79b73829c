"""What a full page is called: the names under which requests find the keys and values that others have computed.

A page's content depends on all tokens up to its end, on the adapter, and on nothing else. Its name is a SHA-256 over
the name of the page before it and its own tokens; the chain begins with a root that says whose content it is. Tenants
and salts are in the root although the content does not depend on them: whether a prompt is computed fast tells that
somebody sent it before, and that is not for others to learn.
"""

from __future__ import annotations

from array import array
from hashlib import sha256


def root_name(tenant: str, cache_salt: str, adapter: str | None) -> bytes:
    """What a request's pages have in common with those that it may share."""
    return sha256(repr((tenant, cache_salt, adapter)).encode()).digest()


def extend_names(names: list[bytes], root: bytes, token_ids: list[int], page_size: int, num_pages: int) -> None:
    """Append the names of the pages of `token_ids` until there are `num_pages`, all of which must be full."""
    assert num_pages * page_size <= len(token_ids)
    for page in range(len(names), num_pages):
        tokens = array("q", token_ids[page * page_size : (page + 1) * page_size])
        names.append(sha256((names[-1] if names else root) + tokens.tobytes()).digest())
