"""An adapter's directory: its files by name, opened and read within bounds, and its name in messages.

A name is the one that the caller of a registration gave. A request that uses the adapter later comes from somebody
else, so its messages have no name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO

from lorafleet.workers.errors import AdapterRefusedError, cut
from lorafleet.workers.found_file import FoundFileError, open_found, read_found

_MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """path: the real location. shown: the caller's name for it, the only one that messages may contain; empty: none.

    roots: the files' real paths must lie below one of these; empty: anywhere. place: finds the same directory again on
    any worker: an absolute path, or a hub id with its revision.
    """

    path: Path
    shown: str
    roots: tuple[Path, ...]
    place: str

    @classmethod
    def at(
        cls, path: Path, shown: str | None = None, roots: Sequence[Path] = (), *, place: str | None = None
    ) -> AdapterFolder:
        return cls(path, cut(str(path) if shown is None else shown), tuple(roots), place or str(path))

    def __str__(self) -> str:
        return self.shown or "The adapter"

    def unnamed(self) -> AdapterFolder:
        """Return the same directory for messages to those who request the adapter and did not name its directory."""
        return replace(self, shown="")

    def shown_file(self, name: str) -> Path:
        """Return a file's path for messages."""
        return Path(self.shown) / cut(name)

    def names(self) -> list[str]:
        """Return the names in it, sorted. Raises `AdapterRefusedError`."""
        try:
            with os.scandir(self.path) as entries:
                names = [entry.name for entry in islice(entries, _MAX_ENTRIES + 1)]
        except OSError as error:
            raise AdapterRefusedError(
                f"{self} cannot be read: {error.strerror}. Give a directory with a PEFT adapter.",
                reason="missing_directory",
            ) from error
        if len(names) > _MAX_ENTRIES:
            raise AdapterRefusedError(
                f"{self} holds more than {_MAX_ENTRIES:,} files. Give a directory with a PEFT adapter alone.",
                reason="not_peft",
            )
        return sorted(names)

    def open(self, name: str) -> IO[bytes]:
        """Open a file. Raises `OSError`; the text of a `FoundFileError` may be shown."""
        return open_found(self.path / name, self.roots)

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return a file's content; None if it does not exist. Raises `AdapterRefusedError`."""
        try:
            return read_found(self.path / name, max_bytes, self.roots)
        except FileNotFoundError:
            return None
        except FoundFileError as error:
            raise self.refused(name, f"{error.what}.", error.reason) from error

    def refused(self, name: str, what: str, reason: str) -> AdapterRefusedError:
        return AdapterRefusedError(f"{self.shown_file(name)} {what}", reason=reason)
