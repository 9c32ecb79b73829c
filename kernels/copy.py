"""Many small copies in one call: for each of them, place[i] = source, for the same i.

Each place has a first dimension to choose from (the slot) and behind that the source's shape; the source has one or two
dimensions. Their last dimensions are contiguous, and of one dtype. Called one by one, several hundred copies would cost
many times their memory's time, and between any two of them another thread could take Python's lock.

Sources that lie in one storage are known by where they lie in it, so that a list, which takes long to make, serves any
storage that is filled in the same way.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from lorafleet.kernels.native import library

# Of a row: source, whether that is counted from the storage, place[0], bytes from place[i] to place[i + 1], rows, bytes
# of a row, strides of both.
_COLUMNS = 8


class Copies:
    """A list of copies, made once and run in pieces, as often as wanted.

    The owner keeps the memory of places and sources for as long as it is run: a list may know only where they are.
    """

    def __init__(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], storage: torch.UntypedStorage | None = None
    ) -> None:
        """(place, source) each. storage: where sources may lie."""
        self.num_copies = len(pairs)
        self._ends: list[int] = []  # bytes of the copies up to and with this one
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
        """Behind the last copy that, with those from `begin` on, takes at most `max_bytes`; one at least is taken."""
        before = self._ends[begin - 1] if begin else 0
        end = begin + 1
        while end < self.num_copies and self._ends[end] - before <= max_bytes:
            end += 1
        return end

    def run(self, i: int, begin: int = 0, end: int | None = None, storage: torch.UntypedStorage | None = None) -> None:
        """Make the copies from `begin` to `end` (behind the last).

        storage: the one that the list was made with, or, where it `is_native`, one like that.
        """
        end = self.num_copies if end is None else end
        if self._rows is None:
            copy_reference(self._pairs[begin:end], i)
            return
        address = self._rows.buffer_info()[0] + begin * _COLUMNS * self._rows.itemsize
        library().lf_copy(address, i, end - begin, 0 if storage is None else storage.data_ptr())

    def run_from(self, i: int, staged: torch.Tensor) -> None:
        """Make all copies, of sources in the storage from where its bytes are `staged`. Only where not `is_native`."""
        assert not self.is_native
        copy_reference([(place, self._in(staged, source)) for place, source in self._pairs], i)

    def _in(self, staged: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """What lies in the staged bytes as a source does in its storage; a source that lies elsewhere."""
        if source.untyped_storage().data_ptr() != self._start:
            return source
        size = source.element_size()
        whole = staged[: staged.numel() // size * size].view(source.dtype)
        return whole.as_strided(source.shape, source.stride(), source.storage_offset())


def copy_reference(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], i: int) -> None:
    """One by one: defines what is right."""
    for place, source in pairs:
        place[i].copy_(source, non_blocking=True)
