"""A safetensors file, read into one buffer: the first time through its header, later by the layout that was found then.

Owns: bytes to tensors, and what is known of a file that was verified. Leaves to others: what the tensors' names mean
(weights_file.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open

from lorafleet.workers.adapters.digest import FileStamp
from lorafleet.workers.errors import AdapterRefusedError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Key = tuple[int, str, str]  # (layer, module, side)
KeyedTensor = tuple[int, str, str, torch.Tensor]
KeysOf = Callable[[Any], dict[str, Key]]  # checks an open header, and says what each name is


class _Place(NamedTuple):
    """Where a tensor's bytes begin behind the header, and what they are. Sorts canonically."""

    layer: int
    module: str
    side: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Layout:
    """Where a file's tensors lie, in canonical order. Files that are laid out alike have one object: `_shared`."""

    places: tuple[_Place, ...]
    num_bytes: int  # of all; they are the file's end


_layouts: WeakValueDictionary[tuple[_Place, ...], Layout] = WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file as it was when it was verified. Small, since thousands are kept."""

    name: str
    layout: Layout
    stamp: FileStamp | None  # None: nothing vouches for the content


class FirstRead(NamedTuple):
    tensors: list[KeyedTensor]
    file: TensorFile
    changed: bool  # while it was read


def open_file(path: Path) -> IO[bytes]:
    """For `read_again`. Raises `OSError`."""
    return path.open("rb", buffering=0)


def read_file(path: Path, keys_of: KeysOf, settle: bool) -> FirstRead:
    """Read a file through its header, all of which `keys_of` has approved. Raises `AdapterRefusedError`.

    `settle`: the stamp is to be proof of what is read, see `FileStamp.settle`.
    """
    try:
        with open_file(path) as file:
            stamp = FileStamp.of(file)
            proof = stamp if not settle or stamp.settle() else None
            layout = _layout(path, file.fileno(), keys_of)
            tensors = _read(file, layout)
            changed = FileStamp.of(file) != stamp
    except (SafetensorError, OSError) as error:
        if _is_pickle(path):
            raise refused(path, "is a pickle under another name, which is never read.", "pickle") from error
        raise refused(path, f"cannot be read as safetensors: {error}.", "bad_safetensors") from error
    return FirstRead(tensors, TensorFile(path.name, layout, proof), changed)


def read_again(file: IO[bytes], known: TensorFile) -> tuple[list[KeyedTensor], bool]:
    """What now lies where the verified tensors lay, and whether the file's stamp proves that it is still them.

    Raises `OSError`. Several threads may read one open file.
    """
    before = FileStamp.of(file)
    tensors = _read(file, known.layout)
    return tensors, known.stamp is not None and before == known.stamp == FileStamp.of(file)


def in_order(of_files: Iterable[list[KeyedTensor]]) -> list[KeyedTensor]:
    """The tensors of an adapter's files in canonical order."""
    return sorted((tensor for tensors in of_files for tensor in tensors), key=lambda tensor: tensor[:3])


def refused(path: Path, what: str, reason: str) -> AdapterRefusedError:
    return AdapterRefusedError(f"{path} {what}", reason=reason)


def _layout(path: Path, descriptor: int, keys_of: KeysOf) -> Layout:
    # By its descriptor: the path may lead to another file by now. pread: a mapped file that shrinks kills the process.
    with safe_open(f"/dev/fd/{descriptor}", framework="pt", backend="pread") as header:
        in_file_order = header.offset_keys()
        keys = keys_of(header)
        slices = {name: header.get_slice(name) for name in in_file_order}
        shapes = {name: tuple(slices[name].get_shape()) for name in in_file_order}
        dtypes = {name: DTYPES.get(slices[name].get_dtype()) for name in keys}
        for name, dtype in dtypes.items():
            if dtype is None:
                raise refused(
                    path,
                    f"has {name} in {header.get_tensor(name).dtype}; float32, float16 and bfloat16 are read.",
                    "unsupported_dtype",
                )
    places = []
    start = 0
    for name in in_file_order:
        dtype, shape = dtypes[name], shapes[name]
        assert dtype is not None
        places.append(_Place(*keys[name], start, dtype, shape))
        start += math.prod(shape) * dtype.itemsize
    return _shared(tuple(sorted(places)), start)


def _shared(places: tuple[_Place, ...], num_bytes: int) -> Layout:
    layout = Layout(places, num_bytes)
    return _layouts.setdefault(layout.places, layout)


def _read(file: IO[bytes], layout: Layout) -> list[KeyedTensor]:
    """All tensors, as views of one buffer."""
    num_bytes = layout.num_bytes
    data = torch.empty(-(-num_bytes // 4) * 4, dtype=torch.uint8)  # whole elements of any dtype
    rest = data.numpy().data[:num_bytes]
    # No gaps, says the library: the last tensor ends where the file does.
    offset = os.fstat(file.fileno()).st_size - num_bytes
    while rest:
        num_read = os.preadv(file.fileno(), [rest], offset)  # at most 2 GiB
        if not num_read:
            raise OSError("it ends early")
        rest, offset = rest[num_read:], offset + num_read
    return _views(data, layout)


def _views(data: torch.Tensor, layout: Layout) -> list[KeyedTensor]:
    elements = {dtype: data.view(dtype) for dtype in DTYPES.values()}
    views = []
    for layer, module, side, start, dtype, shape in layout.places:
        if start % dtype.itemsize == 0:
            strides = (shape[1], 1) if len(shape) == 2 else (1,)
            tensor = elements[dtype].as_strided(shape, strides, start // dtype.itemsize)
        else:  # possible where dtypes are mixed
            stop = start + math.prod(shape) * dtype.itemsize
            tensor = data[start:stop].clone().view(dtype).view(shape)
        views.append((layer, module, side, tensor))
    return views


def _is_pickle(path: Path) -> bool:
    """By its first bytes: torch's zip, or a bare pickle. False for what cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError:
        return False
    return head == b"PK" or head[:1] == b"\x80"
