"""Many small copies in one call: place[i] = source for each copy, with the same i.

Each place has a first dimension to choose from (the slot), followed by the source's shape; a source has one or two
dimensions. The last dimensions are contiguous and of one dtype. Called one by one, several hundred copies would cost
many times their memory traffic, and between any two of them another thread could take Python's lock.

Sources in one storage are recorded as offsets, so one (expensive) list of copies serves every storage with the same
layout.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from lorafleet.kernels.native import library

# A row: source, whether that is an offset into the storage, place[0], bytes from place[i] to place[i + 1], rows, bytes
# per row, the strides of both.
_COLUMNS = 8


class Copies:
    """A list of copies, made once and run in pieces, any number of times.

    The owner must keep the memory of places and sources alive: a list may hold only addresses.
    """

    def __init__(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], storage: torch.UntypedStorage | None = None
    ) -> None:
        """pairs: (place, source). storage: the storage of those sources that are recorded as offsets."""
        self.num_copies = len(pairs)
        self._ends: list[int] = []  # total bytes up to and including this copy
        rows: array[int] = array("q")
        total = 0
        on_cpu = True
        start = None if storage is None else storage.data_ptr()
        for place, source in pairs:
            assert place.shape[1:] == source.shape and place.dtype == source.dtype
            size = source.element_size()
            if source.dim() == 2:
                (height, width), (stride, unit) = source.shape, source.stride()
                step, place_stride, place_unit = place.stride()
            else:
                (width,), (unit,), (step, place_unit) = source.shape, source.stride(), place.stride()
                height, stride, place_stride = 1, 0, 0
            assert unit == place_unit == 1 or width <= 1
            width *= size
            total += height * width
            self._ends.append(total)
            on_cpu = on_cpu and place.is_cpu and source.is_cpu
            is_stored = source.untyped_storage().data_ptr() == start
            rows.extend((source.data_ptr() - (start or 0) * is_stored, is_stored))
            rows.extend((place.data_ptr(), step * size, height, width, stride * size, place_stride * size))
        self.is_native = on_cpu and library() is not None
        self._rows = rows if self.is_native else None
        self._pairs = () if self.is_native else pairs
        self._start = start

    def end_of(self, begin: int, max_bytes: int) -> int:
        """Return the end of the longest run of copies from `begin` with at most `max_bytes`, and at least one copy."""
        before = self._ends[begin - 1] if begin else 0
        end = begin + 1
        while end < self.num_copies and self._ends[end] - before <= max_bytes:
            end += 1
        return end

    def run(self, i: int, begin: int = 0, end: int | None = None, storage: torch.UntypedStorage | None = None) -> None:
        """Run the copies from `begin` up to but not including `end`.

        storage: the one the list was made with or, if it `is_native`, one with the same layout.
        """
        end = self.num_copies if end is None else end
        if self._rows is None:
            copy_reference(self._pairs[begin:end], i)
            return
        address = self._rows.buffer_info()[0] + begin * _COLUMNS * self._rows.itemsize
        library().lf_copy(address, i, end - begin, 0 if storage is None else storage.data_ptr())

    def run_from(self, i: int, staged: torch.Tensor) -> None:
        """Run all copies; read sources in the storage from their copy in `staged`. Only if not `is_native`."""
        assert not self.is_native
        copy_reference([(place, self._in(staged, source)) for place, source in self._pairs], i)

    def _in(self, staged: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Return the view of the staged bytes that corresponds to a source; a source outside the storage as it is."""
        if source.untyped_storage().data_ptr() != self._start:
            return source
        size = source.element_size()
        whole = staged[: staged.numel() // size * size].view(source.dtype)
        return whole.as_strided(source.shape, source.stride(), source.storage_offset())


def copy_reference(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], i: int) -> None:
    """Copy one by one. Defines the correct result."""
    for place, source in pairs:
        place[i].copy_(source, non_blocking=True)
