"""Secrets in files that only their owner can read."""

from __future__ import annotations

import os
from pathlib import Path


def write_secret(path: Path, secret: str) -> Path:
    """Write a new file. Raises `FileExistsError`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret)
    return path
