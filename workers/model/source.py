"""Where base models come from: a directory, a GGUF file, a Hugging Face id, or a folder of the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from lorafleet.workers.adapters.sources import hub_snapshot
from lorafleet.workers.errors import AdapterRefusedError, ModelError
from lorafleet.workers.model.gguf import Progress, cached_gguf

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*"]


def resolve_model(model: str, progress: Progress | None = None) -> Path:
    """A local directory with config.json and safetensors; downloads a hub id, converts a GGUF file once.

    Anything that exists or looks like a path is never asked of the hub. Raises `ModelError`.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if path.name.startswith("models--"):
            try:
                return hub_snapshot(path)
            except AdapterRefusedError as error:
                raise ModelError(error.message) from error
        return path.resolve()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is a file; give a model directory or a .gguf file.")
        return cached_gguf(path, progress)
    if model.startswith(("/", "~", ".")) or not _HUB_ID.fullmatch(model):
        raise ModelError(
            f"{path} does not exist. Give a model directory, a .gguf file or a Hugging Face id (org/name)."
        )
    return _download(model)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"No directory {hub_id!r} exists here, and the Hugging Face hub did not give it: {first_line}"
        ) from error
