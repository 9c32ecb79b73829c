"""Files written by others, opened and read within bounds.

Only regular files are opened, so no read blocks on a FIFO, device or socket. A link must not lead outside the allowed
roots. Sizes are checked before anything is read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_ADVICE = "is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned, or download it again"

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class FoundFileError(OSError):
    """A file that must not or cannot be read. what: the predicate of a sentence about it. reason: a stable code."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what)
        self.what = what
        self.reason = reason


def open_found(path: Path, roots: Sequence[Path] = ()) -> IO[bytes]:
    """Open a regular file for reading, unbuffered. roots: its real path must lie below one of them; empty: anywhere.

    Raises `FileNotFoundError`, or `FoundFileError` for any other obstacle.
    """
    try:
        _check_regular(os.stat(path).st_mode)  # merely opening a device can have effects  # noqa: PTH116
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        if os.path.lexists(path):
            raise FoundFileError("is a link that leads nowhere", "broken_link") from error
        raise
    except FoundFileError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise _unreadable(error) from error
    try:
        opened = os.fstat(descriptor)
        _check_regular(opened.st_mode)
        if roots:
            _check_below(path, opened, roots)
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_found(path: Path, max_bytes: int, roots: Sequence[Path] = ()) -> bytes:
    """Return the content of a file of at most `max_bytes`. Raises the same errors as `open_found`."""
    with open_found(path, roots) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise _too_large(max_bytes)
        try:
            parts, rest = [], max_bytes + 1
            while rest and (part := file.read(rest)):
                parts.append(part)
                rest -= len(part)
        except OSError as error:
            raise _unreadable(error) from error
    if not rest:  # it grew after fstat
        raise _too_large(max_bytes)
    return b"".join(parts)


def json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises `ValueError`, whose text is the predicate of a sentence, for anything else."""
    if data.startswith(LFS_POINTER):
        raise ValueError(LFS_ADVICE)
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not JSON in UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("cannot be read as JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"holds {type(value).__name__}, not a JSON object")
    return value


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise FoundFileError(f"is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file", "not_a_file")


def _check_below(path: Path, opened: os.stat_result, roots: Sequence[Path]) -> None:
    """Check that the opened file is the one at `path`, links followed, and lies below a root."""
    try:
        real = path.resolve(strict=True)
        found = real.stat()
    except (OSError, RuntimeError) as error:
        raise FoundFileError("changed while it was read", "changed_while_read") from error
    if (found.st_dev, found.st_ino) != (opened.st_dev, opened.st_ino):
        raise FoundFileError("changed while it was read", "changed_while_read")
    if not any(real.is_relative_to(root) for root in roots):
        raise FoundFileError("is a link to outside the directories allowed at run time", "outside_roots")


def _unreadable(error: OSError | ValueError) -> FoundFileError:
    strerror = error.strerror if isinstance(error, OSError) else None
    return FoundFileError(f"cannot be read: {strerror or type(error).__name__}", "unreadable")


def _too_large(max_bytes: int) -> FoundFileError:
    return FoundFileError(f"is larger than {max_bytes:,} bytes, the limit for such a file", "file_too_large")
