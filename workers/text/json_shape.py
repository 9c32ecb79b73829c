"""Size limits on JSON text, checked by counting before it is decoded.

A decoder creates an object per value and holds Python's lock until all are made: eight megabytes of `{},{},...` take it
a quarter of a second and 500 MB. Counting takes a few passes in C over slices, and other threads run in between.

Owns: counting and the limits. Leaves to others: decoding, which also detects invalid JSON.
"""

from __future__ import annotations

import itertools
import re
from typing import Final

from lorafleet.workers.errors import InvalidRequestError

MAX_DEPTH: Final = 64
"""Maximum nesting of objects and lists."""
MAX_STRINGS: Final = 1 << 16
MAX_CONTAINERS: Final = 1 << 16
MAX_VALUES: Final = 1 << 20

_SLICE_BYTES = 1 << 20
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{},'))
_STRING = re.compile(rb'"[^"]*"')
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def check_shape(text: bytes, what: str, *, param: str | None = None) -> None:
    """Raise `InvalidRequestError` for a text with more or deeper values than a request may have.

    what: names the text in the message. In invalid JSON everything up to the first mistake is counted correctly, and a
    decoder gets no further.
    """
    num_opened, num_others = text.count(b"{") + text.count(b"["), text.count(b",") + text.count(b'"')
    if num_opened <= min(MAX_DEPTH, MAX_CONTAINERS) and num_others < min(MAX_STRINGS, MAX_VALUES):
        return  # within the limits wherever its strings begin and end
    structure = _structure(text)
    _check_count(structure.count(b'"') // 2, MAX_STRINGS, "strings", what, param)
    structure = _STRING.sub(b"", structure)
    _check_count(structure.count(b",") + 1, MAX_VALUES, "values", what, param)
    brackets = structure.translate(None, b",")
    _check_count(brackets.count(b"{") + brackets.count(b"["), MAX_CONTAINERS, "objects and lists", what, param)
    depth = max(itertools.accumulate(map(_STEPS.__getitem__, brackets)), default=0)
    if depth > MAX_DEPTH:
        raise InvalidRequestError(f"{what} is nested {depth} deep; the limit is {MAX_DEPTH}.", param=param)


def _check_count(count: int, limit: int, kind: str, what: str, param: str | None) -> None:
    if count > limit:
        raise InvalidRequestError(
            f"{what} holds {count} {kind}; the limit is {limit}. Send less at a time.", param=param
        )


def _structure(text: bytes) -> bytes:
    """Return the quotes that begin or end a string, and all brackets and commas, in strings too."""
    pieces = []
    start = 0
    while start < len(text):
        piece = text[start : start + _SLICE_BYTES]
        num_backslashes = len(piece) - len(piece.rstrip(b"\\"))
        if num_backslashes % 2 and len(piece) == _SLICE_BYTES:
            piece = piece[:-1]  # the backslash belongs to the next slice's first byte
        start += len(piece)
        pieces.append(piece.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NOT_STRUCTURE))
    return b"".join(pieces)
