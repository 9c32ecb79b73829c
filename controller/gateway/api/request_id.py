"""The id of a request: the client's, in a header or in the body, or one of our own.

It is in logs, in the answer's `id` and in its header `x-request-id`. Owns: what of a client's text becomes an id.
"""

from __future__ import annotations

import re
import uuid
from typing import Final

from aiohttp import web

HEADER: Final = "x-request-id"
MAX_CHARS: Final = 128
_UNSAFE = re.compile(r"[^A-Za-z0-9._:-]+")

REQUEST_ID: Final = web.RequestKey("request_id", str)
"""Set for every request."""


def clean(text: str) -> str:
    """Return a client's id without the characters that logs and headers cannot hold, cut; empty if nothing is left."""
    return _UNSAFE.sub("", text[: 4 * MAX_CHARS])[:MAX_CHARS]


def give_id(request: web.Request) -> None:
    """Give a request the id of its header, or a new one."""
    request[REQUEST_ID] = clean(request.headers.get(HEADER, "")) or uuid.uuid4().hex


def take_id(request: web.Request, of_body: str | None) -> None:
    """Give a request the id that its body asks for. The header comes first."""
    if of_body and not clean(request.headers.get(HEADER, "")):
        request[REQUEST_ID] = clean(of_body) or request[REQUEST_ID]
