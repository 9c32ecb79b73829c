"""Tokenizers and templates of adapters that have their own, read from their directories."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from lorafleet.workers.text.check_process import check_apart
from lorafleet.workers.text.files import files_digest, over_model, read_adapter_files, read_text_files
from lorafleet.workers.text.model_text import ModelText

_MAX_CHECKED = 10_000  # digests, of 64 bytes


class AdapterTokenizers:
    """Reads and checks adapters' files; keeps only the base model's. Thread-safe."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._lock = threading.Lock()
        self._checked: OrderedDict[str, None] = OrderedDict()  # digests of files that passed, oldest first

    @cached_property
    def model_files(self) -> dict[str, bytes]:
        return read_text_files(self._model_dir)

    @cached_property
    def model(self) -> ModelText:
        """Return the base model's tokenizer and template. Raises `ModelError`."""
        return ModelText.from_files(files_digest(self.model_files), self.model_files)

    def files(self, adapter_dir: Path, roots: Sequence[Path] = ()) -> dict[str, bytes] | None:
        """Return the files of the adapter's tokenizer and template; None if they equal the model's.

        roots: the files' real paths must lie below one of these; empty: anywhere. Raises `ModelError` for a broken
        tokenizer or template, or a file that is too large or not regular. Content equal to the model's is kept once.
        """
        model = self.model_files
        files = over_model(model, read_adapter_files(adapter_dir, roots))
        if files == model:
            return None
        files = {name: model[name] if data == model.get(name) else data for name, data in files.items()}
        digest = files_digest(files)
        with self._lock:
            is_checked = digest in self._checked
        if not is_checked:
            check_apart(digest, files)
            with self._lock:
                self._checked[digest] = None
                if len(self._checked) > _MAX_CHECKED:
                    self._checked.popitem(last=False)
        return files
