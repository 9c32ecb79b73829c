"""Sampling defaults recommended by a model's author, in its generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorafleet.workers.errors import ModelError

_FIELDS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}


def parse_generation_defaults(data: bytes, where: str) -> dict[str, Any]:
    """Return keyword arguments for `SamplingParams`; absent or null fields are left out. Raises `ModelError`."""
    try:
        config = json.loads(data)
        return {name: kind(config[name]) for name, kind in _FIELDS.items() if config.get(name) is not None}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(f"{where} is broken: {error}") from error


def read_generation_defaults(model_dir: Path) -> dict[str, Any]:
    """Return the defaults of a model directory; empty if it has no generation_config.json."""
    path = model_dir / "generation_config.json"
    return parse_generation_defaults(path.read_bytes(), str(path)) if path.is_file() else {}
