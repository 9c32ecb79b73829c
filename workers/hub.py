"""The Hugging Face hub: ids (org/name, or org/name@revision), its local cache, downloads.

Shared by base models and adapters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


class HubError(Exception):
    """The hub or its cache did not give what was asked for; the message says why."""


def is_hub_id(text: str) -> bool:
    """Whether `text` may be a hub id (org/name, org/name@revision). What looks like a path is never one."""
    return not text.startswith(("/", "~", ".")) and _HUB_ID.fullmatch(text) is not None


def pinned_id(hub_id: str, snapshot: Path) -> str:
    """The id of just the revision that was downloaded to `snapshot`."""
    return f"{hub_id.partition('@')[0]}@{snapshot.name}"


def is_cache_folder(path: Path) -> bool:
    """Whether `path` is a repository's folder in the hub's cache (models--org--name)."""
    return path.name.startswith("models--") and (path / "snapshots").is_dir()


def cached_snapshot(folder: Path) -> Path:
    """The snapshot in a cache folder: that of `main`, else the newest. Raises `HubError`."""
    main = folder / "refs" / "main"
    if main.is_file():
        snapshot = folder / "snapshots" / main.read_text().strip()
        if snapshot.is_dir():
            return snapshot
    snapshots = [entry for entry in (folder / "snapshots").iterdir() if entry.is_dir()]
    if not snapshots:
        raise HubError(f"{folder} is a hub cache folder without a snapshot.")
    return max(snapshots, key=lambda entry: entry.stat().st_mtime)


def download(hub_id: str, patterns: Sequence[str]) -> Path:
    """The repository's files that match, in the hub's cache. Raises `HubError`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise HubError(
            f"No directory {hub_id!r} exists here, and the Hugging Face hub did not give it: "
            f"{lines[0] if lines else type(error).__name__}"
        ) from error
