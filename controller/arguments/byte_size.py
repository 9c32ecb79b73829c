"""Sizes on a command line."""

from __future__ import annotations

import argparse
import re
from typing import Final

from lorafleet.controller.arguments.parser import quoted

_UNITS: Final = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]i?)?b?", re.IGNORECASE)


def byte_size(text: str) -> int:
    """Return '2GiB', '500MB' or '1048576' in bytes. For argparse."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a size; write it like 2GiB, 500MB or 1048576")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def size_text(size: int) -> str:
    """Return a size as `byte_size` reads it, in the largest unit that divides it."""
    for unit in ("ti", "gi", "mi", "ki"):
        if size and not size % _UNITS[unit]:
            return f"{size // _UNITS[unit]}{unit.capitalize()}B"
    return str(size)
