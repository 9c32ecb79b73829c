"""A stamp of an adapter's directory, to tell whether its files have changed since they were read."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from lorafleet.workers.sources import hub

_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_TICK_NS = 20_000_000  # longer than any tick of the file system's clock
_COARSE_TICK_NS = 2_000_000_000  # if it has whole seconds


@dataclass(frozen=True, slots=True)
class DirectoryStamp:
    """The file system's record of a directory's adapter files: equal stamps, if proof, mean equal bytes.

    Two changes within one tick of the file system's clock look the same, so only older changes prove anything.
    """

    directory: str  # a real path: a link may point elsewhere later
    files: tuple[tuple[str, int, int, int, int], ...]  # name, inode, size, modified, changed, in order
    is_proof: bool = field(compare=False)

    @classmethod
    def of(cls, path: str) -> DirectoryStamp | None:
        """Return the stamp; None if there is no directory. Waits at most 20 ms if a file was just written."""
        stamp = cls._take(path)
        if stamp is not None and not stamp.is_proof:
            time.sleep(_TICK_NS / 1e9)
            stamp = cls._take(path)
        return stamp

    @classmethod
    def _take(cls, path: str) -> DirectoryStamp | None:
        now_ns = time.time_ns()
        try:
            directory = Path(path).expanduser()
            if hub.is_cache_folder(directory):
                directory = hub.cached_snapshot(directory)
            directory = directory.resolve(strict=True)
            with os.scandir(directory) as entries:
                found = sorted((entry.name, entry.stat()) for entry in entries if entry.name.endswith(_SUFFIXES))
        except (OSError, RuntimeError, ValueError, hub.HubError):
            return None
        files = tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found)
        return cls(str(directory), files, all(_is_old(stat.st_ctime_ns, now_ns) for _, stat in found))


def _is_old(changed_ns: int, now_ns: int) -> bool:
    tick_ns = _TICK_NS if changed_ns % 1_000_000_000 else _COARSE_TICK_NS
    return changed_ns + tick_ns < now_ns
