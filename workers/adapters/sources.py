"""Where adapters come from: a directory, a Hugging Face id, or a folder of the hub's cache.

A root bounds what callers from outside may name: a directory, below which adapters must really lie (symbolic links are
followed first), or `hf://`, any Hugging Face id, or `hf://org`, one organisation's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafleet.workers import hub
from lorafleet.workers.errors import AdapterRefusedError

_FILES = (
    "adapter_config.json",
    "*.safetensors",
    "new_embeddings*",  # a pickle of them is refused, not left out
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
)


HUB_ROOT = "hf://"


def resolve_adapter(path_or_id: str, roots: Sequence[str] | None = None) -> Path:
    """The local directory of an adapter; downloads a hub id. Raises `AdapterRefusedError`.

    roots: None allows everything. With roots a relative path is looked up below each of them.
    """
    try:
        path = Path(path_or_id).expanduser() if roots is None else _below(path_or_id, roots)
        if path is None:
            return hub.download(path_or_id, _FILES)
        if path.is_dir():
            return hub.cached_snapshot(path) if hub.is_cache_folder(path) else path.resolve()
        if path.exists():
            raise AdapterRefusedError(f"{path} is a file; give the adapter's directory.", reason="missing_directory")
        if hub.is_hub_id(path_or_id):
            return hub.download(path_or_id, _FILES)
    except hub.HubError as error:
        raise AdapterRefusedError(str(error), reason="not_found") from error
    except (OSError, RuntimeError, ValueError) as error:  # not allowed, too long, a NUL, or the home of nobody
        raise AdapterRefusedError(f"{path_or_id} cannot be looked up: {error}", reason="missing_directory") from error
    raise AdapterRefusedError(
        f"{path} does not exist. Give an adapter's directory or a Hugging Face id (org/name).",
        reason="missing_directory",
    )


def _below(path_or_id: str, roots: Sequence[str]) -> Path | None:
    """The real path below a root, or None for a hub id that a root allows. Tells nothing of other paths."""
    organisations = [root.removeprefix(HUB_ROOT).rstrip("/") for root in roots if root.startswith(HUB_ROOT)]
    for root in roots:
        if root.startswith(HUB_ROOT):
            continue
        directory = Path(root).expanduser().resolve()
        path = (directory / path_or_id).resolve()  # of an absolute path, that path
        if path.is_relative_to(directory) and path.exists():
            return path
    if hub.is_hub_id(path_or_id) and any(name in ("", path_or_id.partition("/")[0]) for name in organisations):
        return None
    raise AdapterRefusedError(
        f"There is no adapter {path_or_id!r} that may be loaded at run time: it must exist below a --lora-root "
        f"({', '.join(roots)}).",
        reason="outside_roots",
    )
