"""Reader of a checkpoint's safetensors, whole tensors or slices, so that no rank holds more than its shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from lorafleet.workers.errors import ModelError
from lorafleet.workers.found_file import LFS_ADVICE, LFS_POINTER, FoundFileError, json_object, open_found, read_found

EMBEDDING_WEIGHT: Final = "model.embed_tokens.weight"
HEAD_WEIGHT: Final = "lm_head.weight"

_MAX_INDEX_BYTES = 64 << 20
_COMPARED_ROWS = 4096  # per comparison


class CheckpointReader:
    """The tensors of a model directory by name. Files are memory-mapped; reads are copied out of the map."""

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._file_of = self._index()
        self._open: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read_into(
        self, out: torch.Tensor, name: str, *, rows: slice = slice(None), columns: slice | None = None
    ) -> None:
        """Copy (a slice of) tensor `name` into `out`, converted to its dtype. Raises `ModelError`.

        `rows` slices the first dimension, `columns` the second.
        """
        part = self._slice(name)
        source = part[rows] if columns is None else part[rows, columns]
        if source.shape != out.shape:
            raise ModelError(
                f"{self._dir / self._file_of[name]}: {name} has shape {tuple(part.get_shape())}; its part for this "
                f"rank is {tuple(source.shape)}, but the config needs {tuple(out.shape)}."
            )
        out.copy_(source)

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Return some rows of a tensor, in the file's dtype. Raises `ModelError`."""
        part: torch.Tensor = self._slice(name)[rows]
        return part

    def ties_head(self, wanted: bool) -> bool:
        """Return whether the head is the embedding. wanted: the config's setting, see `read_model_spec`.

        A file with two different tensors keeps them apart, whatever the config says, as in transformers 5.
        """
        if not wanted or HEAD_WEIGHT not in self or EMBEDDING_WEIGHT not in self:
            return wanted
        embedding, head = self._slice(EMBEDDING_WEIGHT), self._slice(HEAD_WEIGHT)
        if embedding.get_shape() != head.get_shape():
            return False
        return all(
            torch.equal(embedding[rows].float(), head[rows].float()) for rows in _parts(embedding.get_shape()[0])
        )

    def _slice(self, name: str) -> Any:
        if name == EMBEDDING_WEIGHT and name not in self and HEAD_WEIGHT in self:
            name = HEAD_WEIGHT  # a tied table may be saved under either name
        file = self._file_of.get(name)
        if file is None:
            raise ModelError(f"{self._dir} lacks the tensor {name}, which its config.json requires.")
        if file not in self._open:
            self._open[file] = _opened(self._dir / file)
        return self._open[file].get_slice(name)

    def _index(self) -> dict[str, str]:
        index_path = self._dir / "model.safetensors.index.json"
        if index_path.is_file():
            try:
                files = json_object(read_found(index_path, _MAX_INDEX_BYTES))["weight_map"]
            except FoundFileError as error:
                raise ModelError(f"{index_path} {error.what}.") from error
            except (ValueError, KeyError) as error:
                raise ModelError(f"{index_path} is broken: {error}") from error
            if not isinstance(files, dict) or not all(_is_file_name(name) for name in files.values()):
                raise ModelError(f"{index_path} is broken: its weight_map must name files in the same directory.")
            return files
        single = self._dir / "model.safetensors"
        if not single.is_file():
            pickled = sorted(self._dir.glob("*.bin")) + sorted(self._dir.glob("*.pt"))
            hint = f" {pickled[0].name} is a pickle, which is never read: convert it to safetensors." if pickled else ""
            raise ModelError(f"{self._dir} has no model.safetensors and no model.safetensors.index.json.{hint}")
        with _opened(single) as opened:
            return dict.fromkeys(opened.keys(), single.name)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if _is_lfs_pointer(path):
            raise ModelError(f"{path} {LFS_ADVICE}.") from error
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from error


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with open_found(path) as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name


def _parts(num_rows: int) -> Iterator[slice]:
    for first in range(0, num_rows, _COMPARED_ROWS):
        yield slice(first, min(first + _COMPARED_ROWS, num_rows))
