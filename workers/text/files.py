"""Files of a tokenizer and a chat template: a model's, and an adapter's merged over its model's.

An adapter has its own tokenizer if it has a tokenizer.json, or a slow tokenizer that is the model's with more tokens.
An adapter with only a template combines it with the model's tokenizer; one without a template uses the model's. The
same holds for its profile (workers/answers/profile.py).

Files are read within bounds: see found_file.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafleet.workers.answers.profile import PROFILE_FILE
from lorafleet.workers.errors import ModelError
from lorafleet.workers.found_file import FoundFileError, json_object, read_found
from lorafleet.workers.text.slow_tokenizer import SLOW_FILES, with_slow_files
from lorafleet.workers.text.tokenizer import TOKENIZER_FILES

CHUNK_BYTES = 1 << 20  # bytes of a file per message
TEXT_FILES = (*TOKENIZER_FILES, PROFILE_FILE)

_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_OF_THE_MODEL = ("config.json", "generation_config.json")  # the model's are used even if the adapter has some


_MAX_BYTES = {
    "tokenizer.json": 64 << 20,  # the largest published ones take 34 MB
    "tokenizer_config.json": 8 << 20,
    "chat_template.jinja": 512 << 10,
    "vocab.json": 16 << 20,
    "merges.txt": 16 << 20,
    "tokenizer.model": 16 << 20,
}
_MAX_OTHER_BYTES = 4 << 20


def read_text_files(directory: Path) -> dict[str, bytes]:
    """Return a model's existing `TEXT_FILES`. Raises `ModelError` for one that cannot be read."""
    files = {}
    for name in TEXT_FILES:
        try:
            data = _read(directory, name)
        except ModelError as error:
            raise ModelError(f"{directory}: {error.message}") from error
        if data is not None:
            files[name] = data
    return files


def read_adapter_files(directory: Path, roots: Sequence[Path] = ()) -> dict[str, bytes]:
    """Return an adapter's files that define its tokenizer, its template or the form of its answers.

    roots: see `open_found`. Raises `ModelError`.
    """
    names = [name for name in TEXT_FILES if name not in _OF_THE_MODEL]
    files = {name: data for name in names if (data := _read(directory, name, roots)) is not None}
    if "tokenizer.json" not in files:  # otherwise the others add nothing
        files |= {name: data for name in SLOW_FILES if (data := _read(directory, name, roots)) is not None}
    return files


def _read(directory: Path, name: str, roots: Sequence[Path] = ()) -> bytes | None:
    """Return a file's content; None if it does not exist. Messages name no directory."""
    try:
        return read_found(directory / name, _MAX_BYTES.get(name, _MAX_OTHER_BYTES), roots)
    except FileNotFoundError:
        return None
    except FoundFileError as error:
        raise ModelError(f"{name} {error.what}.") from error


def over_model(model: Mapping[str, bytes], adapter: Mapping[str, bytes]) -> dict[str, bytes]:
    """Merge the adapter's files over the model's.

    Raises `ModelError` for a broken tokenizer_config.json, or an unsupported slow tokenizer.
    """
    own = with_slow_files(model, {name: data for name, data in adapter.items() if name not in _OF_THE_MODEL})
    templates = {name: own[name] for name in (_TEMPLATE,) if name in own}
    if not templates and "chat_template" in _config(own):
        templates = {_CONFIG: own[_CONFIG]}
    profile = {name: files[name] for files in (model, own) for name in (PROFILE_FILE,) if name in files}
    if "tokenizer.json" in own:
        files = {name: model[name] for name in _OF_THE_MODEL if name in model} | own
        return (files if templates else _with_template(files, model)) | profile
    return (_with_template(model, templates) if templates else dict(model)) | profile


def files_digest(files: Mapping[str, bytes]) -> str:
    """Return the SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()


def chunks(files: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, part of its content), in order, at least one part per file."""
    for name, data in files.items():
        for start in range(0, max(len(data), 1), CHUNK_BYTES):
            yield name, data[start : start + CHUNK_BYTES]


def _with_template(files: Mapping[str, bytes], source: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return `files` with `source`'s template in place of their own, if it has one."""
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
