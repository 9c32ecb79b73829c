"""Whether an adapter's config names the base model that it is to be served on."""

from __future__ import annotations

from pathlib import PurePath


def is_same_base(model: str, named: str | None) -> bool:
    """By the last part of each name, whatever its case. model: a directory, a folder of the hub's cache, or a file.

    True where the config names none.
    """
    return not named or _last_part(model) == _last_part(named)


def _last_part(name: str) -> str:
    parts = PurePath(name).parts
    cached = [part for part in parts if part.startswith("models--")]
    last = cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else ""
    return last.lower().removesuffix(".gguf")
