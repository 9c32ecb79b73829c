"""Tokenizers and templates of adapters that bring their own, read from their directories."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from lorafleet.workers.text.files import files_digest, over_model, read_text_files
from lorafleet.workers.text.model_text import ModelText


class AdapterTexts:
    """Reads them; keeps those of the base model alone. Thread-safe."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir

    @cached_property
    def model_files(self) -> dict[str, bytes]:
        return read_text_files(self._model_dir)

    @cached_property
    def model(self) -> ModelText:
        """The base model's. Raises `ModelError`."""
        return ModelText.from_files(files_digest(self.model_files), self.model_files)

    def files(self, adapter_dir: Path) -> dict[str, bytes] | None:
        """What the adapter's text is made of; None where that is what the model's is made of. Raises `ModelError`.

        What the model has too is in memory once.
        """
        model = self.model_files
        files = over_model(model, read_text_files(adapter_dir))
        if files == model:
            return None
        return {name: model[name] if data == model.get(name) else data for name, data in files.items()}
