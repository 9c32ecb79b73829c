"""A command's messages about its fleet."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """Print a line to stderr at once. A closed terminal raises nothing, so that the fleet still ends in order."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
