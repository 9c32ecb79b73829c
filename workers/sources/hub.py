"""The Hugging Face hub: ids (org/name, or org/name@revision), its local cache, downloads.

Shared by base models and adapters.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from lorafleet.workers.errors import cut, quoted
from lorafleet.workers.found_file import FoundFileError, read_found

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w.-]+(?:/[\w.-]+)*)?")
_REVISION = re.compile(r"[\w.-]+")
_MAX_ID_CHARS = 300

logger = logging.getLogger(__name__)


class HubError(Exception):
    """The hub or its cache could not provide what was asked for; the message says why."""


def is_hub_id(text: str) -> bool:
    """Return whether `text` may be a hub id (org/name, or org/name@revision). Something path-like is never one."""
    return not text.startswith(("/", "~", ".")) and len(text) <= _MAX_ID_CHARS and _HUB_ID.fullmatch(text) is not None


def is_cache_folder(path: Path) -> bool:
    """Return whether `path` is a repository's folder in the hub's cache (models--org--name)."""
    return path.name.startswith("models--") and (path / "snapshots").is_dir()


def cached_snapshot(folder: Path) -> Path:
    """Return a cache folder's snapshot: `main`'s, else the newest. Never outside the folder. Raises `HubError`."""
    try:
        real = folder.resolve(strict=True)
        revision = _main(real)
        if revision is not None:
            snapshot = (real / "snapshots" / revision).resolve()
            if snapshot.is_dir() and snapshot.is_relative_to(real):
                return snapshot
        snapshots = [entry.resolve() for entry in (real / "snapshots").iterdir()]
        snapshots = [entry for entry in snapshots if entry.is_dir() and entry.is_relative_to(real)]
        newest = max(snapshots, key=lambda entry: entry.stat().st_mtime, default=None)
    except OSError as error:
        raise HubError(f"{quoted(folder.name)} cannot be read: {error.strerror}.") from error
    if newest is None:
        raise HubError(f"{quoted(folder.name)} is a hub cache folder without a snapshot.")
    return newest


def download(hub_id: str, patterns: Sequence[str]) -> Path:
    """Download the repository's matching files into the hub's cache. Raises `HubError`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        logger.warning("%s: %s", hub_id, error)
        is_ours = isinstance(error, HfHubHTTPError | LocalEntryNotFoundError) or not isinstance(error, OSError)
        lines = str(error).strip().splitlines() if is_ours else [error.strerror or type(error).__name__]  # type: ignore[union-attr]
        raise HubError(
            f"No directory {hub_id!r} exists here, and it could not be fetched from the Hugging Face hub: "
            f"{cut(lines[0]) if lines else type(error).__name__}"
        ) from error


def list_files(hub_id: str) -> list[str]:
    """Return the repository's files; empty if the hub does not tell."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    repository, _, revision = hub_id.partition("@")
    try:
        return HfApi().list_repo_files(repository, revision=revision or None)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return []


def pinned_id(hub_id: str, snapshot: Path) -> str:
    """Return the id with the downloaded revision, so that the same one is found again."""
    return f"{hub_id.partition('@')[0]}@{snapshot.name}" if snapshot.parent.name == "snapshots" else hub_id


def _main(folder: Path) -> str | None:
    try:
        name = read_found(folder / "refs" / "main", 1000, [folder]).decode().strip()
    except (FileNotFoundError, FoundFileError, UnicodeDecodeError):
        return None
    return name if _REVISION.fullmatch(name) and name not in (".", "..") else None
