"""Sources of adapters: a directory, a Hugging Face id, or a folder of the hub's cache.

A root limits which adapters outside callers may use. It is a directory, below which the real paths of adapters and
their files must lie, or `hf://` for any Hugging Face id, or `hf://org` for one organisation's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafleet.workers.adapters.folder import AdapterFolder
from lorafleet.workers.adapters.foreign import CONFIG, WEIGHTS, describe_file, describe_repository
from lorafleet.workers.answers.profile import PROFILE_FILE
from lorafleet.workers.errors import AdapterRefusedError, cut, quoted
from lorafleet.workers.sources import hub

_FILES = (
    CONFIG,
    WEIGHTS,
    "new_embeddings*",  # a pickle of them must be refused, not skipped
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
    PROFILE_FILE,
)
_MAX_PATH_CHARS = 4096

HUB_ROOT = "hf://"


def resolve_adapter(path_or_id: str, roots: Sequence[str] | None = None) -> AdapterFolder:
    """Return the local directory of an adapter; download a hub id. Raises `AdapterRefusedError`.

    roots: None allows everything. With roots, a relative path is looked up below each of them.
    """
    if len(path_or_id) > _MAX_PATH_CHARS:
        raise AdapterRefusedError(
            f"{cut(path_or_id)} has {len(path_or_id):,} characters; the limit is {_MAX_PATH_CHARS:,}.",
            reason="missing_directory",
        )
    try:
        path = Path(path_or_id).expanduser() if roots is None else _below(path_or_id, roots)
        if path is None:
            return _downloaded(path_or_id)
        if path.is_dir():
            found = hub.cached_snapshot(path) if hub.is_cache_folder(path) else path.resolve()
            return AdapterFolder.at(found, path_or_id, _directories(roots or ()))
        if path.exists():
            what = describe_file(path, path_or_id)
            raise AdapterRefusedError(f"{cut(path_or_id)} {what}", reason="missing_directory")
        if hub.is_hub_id(path_or_id):
            return _downloaded(path_or_id)
    except hub.HubError as error:
        raise AdapterRefusedError(str(error), reason="not_found") from error
    except (OSError, RuntimeError, ValueError) as error:  # no permission, too long, a NUL, a loop, an unknown user
        raise AdapterRefusedError(
            f"{cut(path_or_id)} cannot be looked up: {_problem(error)}.", reason="missing_directory"
        ) from error
    raise AdapterRefusedError(
        f"{cut(path_or_id)} does not exist. Give an adapter's directory or a Hugging Face id (org/name, or "
        "org/name@revision).",
        reason="missing_directory",
    )


def _downloaded(hub_id: str) -> AdapterFolder:
    path = hub.download(hub_id, _FILES)
    if not all((path / name).is_file() for name in (CONFIG, WEIGHTS)):
        known = describe_repository(hub.list_files(hub_id))
        if known is not None:
            what, reason = known
            raise AdapterRefusedError(f"{hub_id} {what}", reason=reason)
    return AdapterFolder.at(path, hub_id, place=hub.pinned_id(hub_id, path))


def _problem(error: OSError | RuntimeError | ValueError) -> str:
    """Return an error's text without the path that it may contain."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "its links form a loop" if "Symlink loop" in str(error) else str(error)


def _directories(roots: Sequence[str]) -> list[Path]:
    return [Path(root).expanduser().resolve() for root in roots if not root.startswith(HUB_ROOT)]


def _below(path_or_id: str, roots: Sequence[str]) -> Path | None:
    """Return the real path below a root, or None for a hub id that a root allows. Reveals nothing of other paths."""
    organisations = [root.removeprefix(HUB_ROOT).rstrip("/") for root in roots if root.startswith(HUB_ROOT)]
    for directory in _directories(roots):
        path = (directory / path_or_id).resolve()  # an absolute path stays itself
        if path.is_relative_to(directory) and path.exists():
            return path
    if hub.is_hub_id(path_or_id) and any(name in ("", path_or_id.partition("/")[0]) for name in organisations):
        return None
    raise AdapterRefusedError(
        f"There is no adapter {quoted(path_or_id)} that may be loaded at run time: it must exist below a directory "
        "given with --lora-root, or on the hub if a --lora-root allows that.",
        reason="outside_roots",
    )
