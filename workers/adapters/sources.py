"""Where adapters come from: a directory, a Hugging Face id, or a folder of the hub's cache."""

from __future__ import annotations

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


def resolve_adapter(path_or_id: str) -> Path:
    """The local directory of an adapter; downloads a hub id. Raises `AdapterRefusedError`."""
    try:
        path = Path(path_or_id).expanduser()
        if path.is_dir():
            return hub.cached_snapshot(path) if hub.is_cache_folder(path) else path.resolve()
        if path.exists():
            raise AdapterRefusedError(f"{path} is a file; give the adapter's directory.", reason="missing_directory")
        if hub.is_hub_id(path_or_id):
            return hub.download(path_or_id, _FILES)
    except hub.HubError as error:
        raise AdapterRefusedError(str(error), reason="not_found") from error
    except (OSError, RuntimeError) as error:  # not allowed, too long, or the home of nobody
        raise AdapterRefusedError(f"{path_or_id} cannot be looked up: {error}", reason="missing_directory") from error
    raise AdapterRefusedError(
        f"{path} does not exist. Give an adapter's directory or a Hugging Face id (org/name).",
        reason="missing_directory",
    )
