"""Tokenizers and templates of a worker's adapters: gateways get those registered, whatever happens to the files.

Equal ones are kept once, by digest; files that equal the base model's take no extra memory. Beyond a limit of bytes
they are read again from their place and used only if unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lorafleet.workers.adapters.named_work import NamedWork
from lorafleet.workers.errors import LoRAFleetError
from lorafleet.workers.text.adapter_tokenizers import AdapterTokenizers
from lorafleet.workers.text.files import files_digest

_MAX_BYTES = 1 << 30
_READ_S = 30.0  # time limit for reading them again


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The files of an adapter's tokenizer and template."""

    digest: str
    directory: Path
    files: dict[str, bytes]
    roots: Sequence[Path]  # the real paths must lie below one of these; empty: anywhere


@dataclass(slots=True)
class _Held:
    directory: Path
    roots: Sequence[Path]
    files: dict[str, bytes] | None  # None: beyond the limit
    num_bytes: int  # counted against the limit
    holders: int = 0


class RegisteredTokenizers:
    """Tokenizer files by digest. Thread-safe."""

    def __init__(self, model_dir: Path, max_bytes: int = _MAX_BYTES) -> None:
        self._texts = AdapterTokenizers(model_dir)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._bytes = 0
        self._work: NamedWork[str] = NamedWork()

    def read(self, directory: Path, roots: Sequence[Path] = ()) -> TokenizerFiles | None:
        """Read an adapter's files; None if it uses the model's. Slow. Raises what `AdapterTokenizers.files` raises."""
        files = self._texts.files(directory, roots)
        return None if files is None else TokenizerFiles(files_digest(files), directory, files, roots)

    def hold(self, text: TokenizerFiles) -> None:
        """Keep the files for one more adapter."""
        with self._lock:
            held = self._held.get(text.digest)
            if held is None:
                model = self._texts.model_files
                num_bytes = sum(len(data) for name, data in text.files.items() if data is not model.get(name))
                has_room = self._bytes + num_bytes <= self._max_bytes
                held = _Held(text.directory, text.roots, text.files if has_room else None, num_bytes if has_room else 0)
                self._held[text.digest] = held
                self._bytes += held.num_bytes
            held.holders += 1

    def release(self, digest: str) -> None:
        """Release one adapter's hold. No effect for '', the base model's digest."""
        with self._lock:
            held = self._held.get(digest)
            if held is not None:
                held.holders -= 1
                if not held.holders:
                    del self._held[digest]
                    self._bytes -= held.num_bytes

    def files(self, digest: str) -> Future[dict[str, bytes] | None]:
        """Return the files; None if no adapter has them, or if they had to be read again and have changed."""
        with self._lock:
            held = self._held.get(digest)
        if held is None or held.files is not None:
            future: Future[dict[str, bytes] | None] = Future()
            future.set_result(None if held is None else held.files)
            return future
        return self._work.submit(digest, partial(self._read_again, digest, held), lambda files: files, limit_s=_READ_S)

    def close(self) -> None:
        self._work.close()

    def _read_again(self, digest: str, held: _Held) -> dict[str, bytes] | None:
        try:
            files = self._texts.files(held.directory, held.roots)
        except LoRAFleetError:
            return None
        return files if files is not None and files_digest(files) == digest else None
