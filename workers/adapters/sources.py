"""Where adapters come from: a directory, a Hugging Face id, or a folder of the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from lorafleet.workers.errors import AdapterRefusedError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["adapter_config.json", "*.safetensors", "tokenizer*", "special_tokens_map.json", "chat_template*"]


def resolve_adapter(path_or_id: str) -> Path:
    """The local directory of an adapter; downloads a hub id. Raises `AdapterRefusedError`.

    Anything that exists or looks like a path is never asked of the hub. In a hub cache folder (`models--org--name`) the
    snapshot of `main` is taken, else the newest.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return hub_snapshot(path) if path.name.startswith("models--") else path
    if path.exists():
        raise AdapterRefusedError(f"{path} is a file; give the adapter's directory.", reason="missing_directory")
    if path_or_id.startswith(("/", "~", ".")) or not _HUB_ID.fullmatch(path_or_id):
        raise AdapterRefusedError(
            f"{path} does not exist. Give an adapter's directory or a Hugging Face id (org/name).",
            reason="missing_directory",
        )
    return _download(path_or_id)


def hub_snapshot(folder: Path) -> Path:
    """The snapshot directory within a hub cache folder."""
    main = folder / "refs" / "main"
    if main.is_file():
        snapshot = folder / "snapshots" / main.read_text().strip()
        if snapshot.is_dir():
            return snapshot
    snapshots = [entry for entry in (folder / "snapshots").glob("*") if entry.is_dir()]
    if not snapshots:
        raise AdapterRefusedError(f"{folder} is a hub cache folder without a snapshot.", reason="missing_directory")
    return max(snapshots, key=lambda entry: entry.stat().st_mtime)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterRefusedError(
            f"No directory {hub_id!r} exists here, and the Hugging Face hub did not give it: {first_line}",
            reason="not_found",
        ) from error
