"""What a command says of its fleet."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """To stderr, at once. A terminal that has gone must not keep a fleet from being ended in order."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
