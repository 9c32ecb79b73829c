"""Tokenizers and templates of adapters that bring their own, read from their directories."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from pathlib import Path

from lorafleet.workers.text.files import files_digest, over_model, read_text_files
from lorafleet.workers.text.model_text import ModelText

MAX_ADAPTER_TEXTS = 32  # that an offline engine keeps


class AdapterTexts:
    """Those used last are kept, since a tokenizer takes tens of megabytes. Not thread-safe."""

    def __init__(self, model_dir: Path, max_texts: int) -> None:
        self._model_dir = model_dir
        self._max_texts = max_texts
        self._texts: OrderedDict[str, ModelText] = OrderedDict()  # by digest, least recently used first

    @cached_property
    def _model_files(self) -> dict[str, bytes]:
        return read_text_files(self._model_dir)

    @cached_property
    def model(self) -> ModelText:
        """The base model's. Raises `ModelError`."""
        return ModelText.from_files(files_digest(self._model_files), self._model_files)

    def of(self, adapter_dir: Path) -> ModelText | None:
        """An adapter's; None where it is the model's. Raises `ModelError` for a broken tokenizer or template."""
        files = self.files(adapter_dir)
        if files is None:
            return None
        digest = files_digest(files)
        text = self._texts.pop(digest, None) or ModelText.from_files(digest, files)
        self._texts[digest] = text
        if len(self._texts) > self._max_texts:
            self._texts.popitem(last=False)
        return text

    def files(self, adapter_dir: Path) -> dict[str, bytes] | None:
        """What the adapter's text is made of; None where that is what the model's is made of. Raises `ModelError`."""
        files = over_model(self._model_files, read_text_files(adapter_dir))
        return None if files == self._model_files else files
