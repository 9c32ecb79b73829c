"""Comparison of an adapter's declared base model with the model that is served."""

from __future__ import annotations

from pathlib import PurePath


def is_same_base(model: str, named: str | None) -> bool:
    """Return whether both names end in the same part, ignoring case; true if the config names no base model.

    model: a directory, a folder of the hub's cache, or a file.
    """
    return not named or _last_part(model) == _last_part(named)


def _last_part(name: str) -> str:
    parts = PurePath(name).parts
    cached = [part for part in parts if part.startswith("models--")]
    last = cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else ""
    return last.lower().removesuffix(".gguf")
