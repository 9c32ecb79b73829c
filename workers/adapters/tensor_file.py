"""A safetensors file, read into one buffer: the first time through its header, later by the layout that was found then.

Owns: bytes to tensors, and what is known of a file that was verified. Leaves to others: what the tensors' names mean
(weights_file.py).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open

from lorafleet.workers.adapters.digest import FileStamp
from lorafleet.workers.adapters.folder import AdapterFolder
from lorafleet.workers.adapters.foreign import describe_head
from lorafleet.workers.errors import AdapterRefusedError, cut
from lorafleet.workers.found_file import FoundFileError

_MAX_HEADER_BYTES = 4 << 20  # thousands of tensors take some hundred kilobytes
_UNREAD_DTYPES = {"F64": "torch.float64", "I8": "torch.int8", "U8": "torch.uint8", "F8_E4M3": "torch.float8_e4m3fn"}

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


def read_file(folder: AdapterFolder, name: str, keys_of: KeysOf, settle: bool) -> FirstRead:
    """Read a file through its header, all of which `keys_of` has approved. Raises `AdapterRefusedError`.

    `settle`: the stamp is to be proof of what is read, see `FileStamp.settle`.
    """
    path = folder.shown_file(name)
    try:
        with folder.open(name) as file:
            stamp = FileStamp.of(file)
            proof = stamp if not settle or stamp.settle() else None
            _check_head(path, file.fileno())
            layout = _layout(path, file.fileno(), keys_of)
            tensors = _read(file, layout)
            changed = FileStamp.of(file) != stamp
    except FoundFileError as error:
        raise refused(path, f"{error.what}.", error.reason) from error
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise refused(path, f"cannot be read as safetensors: {cut(what)}.", "bad_safetensors") from error
    return FirstRead(tensors, TensorFile(name, layout, proof), changed)


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


def _check_head(path: Path, descriptor: int) -> None:
    """Before a header is read: that it may be one, and how long it is."""
    head = os.pread(descriptor, 64, 0)
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if length <= _MAX_HEADER_BYTES and head[8:9] == b"{":
        return
    known = describe_head(head)
    if known is not None:
        what, reason = known
        raise refused(path, f"{what}.", reason)
    if length > _MAX_HEADER_BYTES:
        raise refused(
            path,
            f"cannot be read as safetensors: its header is said to take {length:,} bytes, the limit is "
            f"{_MAX_HEADER_BYTES:,}.",
            "bad_safetensors",
        )


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
                stored = slices[name].get_dtype()
                raise refused(
                    path,
                    f"has {cut(name)} in {_UNREAD_DTYPES.get(stored, stored)}; float32, float16 and bfloat16 are read.",
                    "unsupported_dtype",
                )
    places = []
    start = 0
    for name in in_file_order:
        dtype, shape = dtypes[name], shapes[name]
        assert dtype is not None
        places.append(_Place(*keys[name], start=start, dtype=dtype, shape=shape))
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
