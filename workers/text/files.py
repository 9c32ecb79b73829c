"""The files that a tokenizer and a chat template are made of: a model's, and an adapter's over its model's.

An adapter with a tokenizer.json brings a tokenizer of its own. One with only a template has that over the model's
tokenizer, and one without a template has the model's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafleet.workers.errors import ModelError
from lorafleet.workers.text.tokenizer import TOKENIZER_FILES

CHUNK_BYTES = 1 << 20  # of a file, in one message

_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_OF_THE_MODEL = ("config.json", "generation_config.json")  # also where they lie beside an adapter


def read_text_files(directory: Path) -> dict[str, bytes]:
    """Those of `TOKENIZER_FILES` that are there. Raises `ModelError` for one that cannot be read."""
    files = {}
    for name in TOKENIZER_FILES:
        path = directory / name
        try:
            if path.is_file():
                files[name] = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    return files


def over_model(model: Mapping[str, bytes], adapter: Mapping[str, bytes]) -> dict[str, bytes]:
    """The model's files with the adapter's over them. Raises `ModelError` for a broken tokenizer_config.json."""
    own = {name: data for name, data in adapter.items() if name not in _OF_THE_MODEL}
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
        config = json.loads(files.get(_CONFIG, b"{}"))
    except ValueError as error:
        raise ModelError(f"{_CONFIG} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{_CONFIG} holds {type(config).__name__}, not a JSON object.")
    return config
