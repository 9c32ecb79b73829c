"""The files that a tokenizer and a chat template are made of: a model's, and an adapter's over its model's.

An adapter with a tokenizer.json, or a slow tokenizer that is the model's with more tokens, brings a tokenizer of its
own. One with only a template has that over the model's tokenizer, and one without a template has the model's.

Files are read within bounds: see found_file.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafleet.workers.errors import ModelError
from lorafleet.workers.found_file import FoundFileError, json_object, read_found
from lorafleet.workers.text.slow_tokenizer import SLOW_FILES, with_slow_files
from lorafleet.workers.text.tokenizer import TOKENIZER_FILES

CHUNK_BYTES = 1 << 20  # of a file, in one message

_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_OF_THE_MODEL = ("config.json", "generation_config.json")  # also where they lie beside an adapter


_MAX_BYTES = {
    "tokenizer.json": 64 << 20,  # the largest published ones have 34 MB
    "tokenizer_config.json": 8 << 20,
    "chat_template.jinja": 512 << 10,
    "vocab.json": 16 << 20,
    "merges.txt": 16 << 20,
    "tokenizer.model": 16 << 20,
}
_MAX_OTHER_BYTES = 4 << 20


def read_text_files(directory: Path) -> dict[str, bytes]:
    """A model's: those of `TOKENIZER_FILES` that are there. Raises `ModelError` for one that is not read."""
    files = {}
    for name in TOKENIZER_FILES:
        try:
            data = _read(directory, name)
        except ModelError as error:
            raise ModelError(f"{directory}: {error.message}") from error
        if data is not None:
            files[name] = data
    return files


def read_adapter_files(directory: Path, roots: Sequence[Path] = ()) -> dict[str, bytes]:
    """An adapter's: those that say something of its text. roots: see `open_found`. Raises `ModelError`."""
    names = [name for name in TOKENIZER_FILES if name not in _OF_THE_MODEL]
    files = {name: data for name in names if (data := _read(directory, name, roots)) is not None}
    if "tokenizer.json" not in files:  # else the others say nothing more
        files |= {name: data for name in SLOW_FILES if (data := _read(directory, name, roots)) is not None}
    return files


def _read(directory: Path, name: str, roots: Sequence[Path] = ()) -> bytes | None:
    """None: there is none. A message names no directory."""
    try:
        return read_found(directory / name, _MAX_BYTES.get(name, _MAX_OTHER_BYTES), roots)
    except FileNotFoundError:
        return None
    except FoundFileError as error:
        raise ModelError(f"{name} {error.what}.") from error


def over_model(model: Mapping[str, bytes], adapter: Mapping[str, bytes]) -> dict[str, bytes]:
    """The model's files with the adapter's over them.

    Raises `ModelError` for a broken tokenizer_config.json, or a slow tokenizer that is not served.
    """
    own = with_slow_files(model, {name: data for name, data in adapter.items() if name not in _OF_THE_MODEL})
    templates = {name: own[name] for name in (_TEMPLATE,) if name in own}
    if not templates and "chat_template" in _config(own):
        templates = {_CONFIG: own[_CONFIG]}
    if "tokenizer.json" in own:
        files = {name: model[name] for name in _OF_THE_MODEL if name in model} | own
        return files if templates else _with_template(files, model)
    return _with_template(model, templates) if templates else dict(model)


def files_digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()


def chunks(files: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """(name, part of its content), in order, at least one for each file."""
    for name, data in files.items():
        for start in range(0, max(len(data), 1), CHUNK_BYTES):
            yield name, data[start : start + CHUNK_BYTES]


def _with_template(files: Mapping[str, bytes], source: Mapping[str, bytes]) -> dict[str, bytes]:
    """`files` with the template of `source` in place of their own, if it has one."""
    if _TEMPLATE in source:
        return dict(files) | {_TEMPLATE: source[_TEMPLATE]}
    template = _config(source).get("chat_template")
    if template is None:
        return dict(files)
    config = _config(files) | {"chat_template": template}
    kept = {name: data for name, data in files.items() if name != _TEMPLATE}
    return kept | {_CONFIG: json.dumps(config).encode()}


def _config(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        return json_object(files.get(_CONFIG, b"{}"))
    except ValueError as error:
        raise ModelError(f"{_CONFIG} {error}.") from error
