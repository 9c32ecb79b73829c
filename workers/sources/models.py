"""Sources of base models: a directory, a GGUF file, a Hugging Face id, or a folder of the hub's cache."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lorafleet.workers.errors import ModelError, cut
from lorafleet.workers.model.gguf import Progress, cached_gguf
from lorafleet.workers.sources import hub

_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*")


def resolve_model(model: str, progress: Progress | None = None) -> Path:
    """Return a local directory with config.json and safetensors; download a hub id, convert a GGUF file once.

    Raises `ModelError`.
    """
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return hub.cached_snapshot(path) if hub.is_cache_folder(path) else path.resolve()
        if path.is_file() and path.suffix.lower() == ".gguf":
            return cached_gguf(path, progress)
        if path.exists():
            raise ModelError(f"{path} is a file; give a model directory or a .gguf file.")
        if hub.is_hub_id(model):
            return hub.download(model, _FILES)
    except hub.HubError as error:
        raise ModelError(str(error)) from error
    except (OSError, RuntimeError) as error:  # too long, no permission, or an unknown user's home
        problem = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{cut(model)} cannot be looked up: {problem}") from error
    raise ModelError(f"{path} does not exist. Give a model directory, a .gguf file or a Hugging Face id (org/name).")


def read_ahead(model_dir: Path) -> None:
    """Let the system read a model's weights into memory while other things start; return at once.

    Only a hint: without it, or where the system lacks it, they are read when needed.
    """
    if hasattr(os, "posix_fadvise"):
        for path in sorted(model_dir.glob("*.safetensors")):
            with contextlib.suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
