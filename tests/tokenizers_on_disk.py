"""Tokenizers as the product reads them: the files of a directory, then what is in them."""

from __future__ import annotations

from pathlib import Path

from lorafleet.workers.text import Tokenizer
from lorafleet.workers.text.files import read_text_files


def from_dir(path: Path) -> Tokenizer:
    return Tokenizer.from_files(read_text_files(path))
