"""Reads a checkpoint's safetensors, whole tensors or slices of them, so that no rank holds more than its share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorafleet.workers.errors import ModelError


class CheckpointReader:
    """The tensors of a model directory by name. Files are memory-mapped; what is read is copied out of the map."""

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._file_of = self._index()
        self._open: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read_into(
        self, out: torch.Tensor, name: str, *, rows: slice = slice(None), columns: slice | None = None
    ) -> None:
        """Copy (a slice of) tensor `name` into `out`, converting to its dtype. Raises `ModelError`.

        `rows` slices the first dimension, `columns` the second.
        """
        part = self._slice(name)
        source = part[rows] if columns is None else part[rows, columns]
        if source.shape != out.shape:
            raise ModelError(
                f"{self._dir / self._file_of[name]}: {name} has shape {tuple(part.get_shape())}, of which "
                f"{tuple(source.shape)} was read where the config wants {tuple(out.shape)}."
            )
        out.copy_(source)

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor, as the file has them. Raises `ModelError`."""
        part: torch.Tensor = self._slice(name)[rows]
        return part

    def _slice(self, name: str) -> Any:
        file = self._file_of.get(name)
        if file is None:
            raise ModelError(f"{self._dir} lacks the tensor {name}, which its config.json calls for.")
        if file not in self._open:
            try:
                self._open[file] = safe_open(self._dir / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self._dir / file} cannot be read as safetensors: {error}") from error
        return self._open[file].get_slice(name)

    def _index(self) -> dict[str, str]:
        index_path = self._dir / "model.safetensors.index.json"
        if index_path.is_file():
            try:
                return dict(json.loads(index_path.read_text())["weight_map"])
            except (ValueError, KeyError, OSError) as error:
                raise ModelError(f"{index_path} is broken: {error}") from error
        single = self._dir / "model.safetensors"
        if not single.is_file():
            pickled = sorted(self._dir.glob("*.bin")) + sorted(self._dir.glob("*.pt"))
            hint = f" {pickled[0].name} is a pickle, which is never read: convert it to safetensors." if pickled else ""
            raise ModelError(f"{self._dir} has no model.safetensors and no model.safetensors.index.json.{hint}")
        try:
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single.name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{single} cannot be read as safetensors: {error}") from error
