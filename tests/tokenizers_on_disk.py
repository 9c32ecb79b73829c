"""Reads tokenizers like the product: the files of a directory, then their contents."""

from __future__ import annotations

from pathlib import Path

from lorafleet.workers.text import Tokenizer
from lorafleet.workers.text.files import read_text_files


def from_dir(path: Path) -> Tokenizer:
    return Tokenizer.from_files(read_text_files(path))
