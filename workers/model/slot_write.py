"""Writing of an adapter into a slot: prepared on another thread, copied in pieces between steps.

Preparation does everything that is slow or needs Python: the destination of each row, DoRA's norms, weights outside the
slot. The stepping thread is left with copying bytes.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorafleet.kernels.copy import Copies
from lorafleet.workers.adapters.format import Form, HostAdapter

_MAX_FORMS = 64  # some tens of KiB each


class SlotRows:
    """Collects the copies to a slot. A linear's numbers are gathered in one tensor for the whole adapter."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._own: list[torch.Tensor] = []  # sources owned by this object
        self._places_of_numbers: list[torch.Tensor] = []
        self._numbers = bytearray()

    def add(self, place_L: torch.Tensor, source: torch.Tensor, *, is_own: bool = False) -> None:
        """Add a copy. `source`, the adapter's or the model's, has the shape of `place_L` without its slot dimension.

        is_own: `source` belongs to neither, so keep it alive.
        """
        if source.dtype != place_L.dtype:
            source, is_own = source.to(place_L.dtype), True
        if is_own:
            self._own.append(source)
        self._pairs.append((place_L, source))

    def add_numbers(
        self, place_L3N: torch.Tensor, ranks: Sequence[int], scalings: Sequence[float], affine: Sequence[int]
    ) -> None:
        """Add a linear's numbers. `place_L3N` is int32; scalings are copied bit by bit."""
        count = len(ranks)
        self._places_of_numbers.append(place_L3N)
        self._numbers += struct.pack(f"={count}i{count}f{count}i", *ranks, *scalings, *affine)

    def copies(self, storage: torch.UntypedStorage | None) -> PreparedCopies:
        """Return the collected copies. storage: the adapter's."""
        flat = torch.frombuffer(self._numbers, dtype=torch.int32)
        parts = flat.split([place.shape[1] * place.shape[2] for place in self._places_of_numbers])
        numbers = zip(self._places_of_numbers, parts, strict=True)
        copies = Copies([*self._pairs, *((place, part.view(place.shape[1:])) for place, part in numbers)], storage)
        return PreparedCopies(copies, (*self._own, flat))


@dataclass(frozen=True, slots=True)
class PreparedCopies:
    """Copies to a slot, any slot, with the sources that do not belong to the adapter."""

    copies: Copies
    own: tuple[torch.Tensor, ...]


class PreparedForms:
    """Lists of copies by adapter form, for the forms used last, since listing is slow. Thread-safe.

    An adapter without a form shares its list with no other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Form, PreparedCopies] = OrderedDict()

    def get(self, form: Form | None) -> PreparedCopies | None:
        if form is None:
            return None
        with self._lock:
            prepared = self._known.get(form)
            if prepared is not None:
                self._known.move_to_end(form)
            return prepared

    def put(self, form: Form | None, prepared: PreparedCopies) -> None:
        if form is None or not prepared.copies.is_native:  # bound to one adapter's memory
            return
        with self._lock:
            self._known[form] = prepared
            if len(self._known) > _MAX_FORMS:
                self._known.popitem(last=False)


class SlotWrite:
    """A write of one adapter into one slot that no request uses: `advance` until it returns true, then `commit`."""

    def __init__(self, slot: int, adapter: HostAdapter, prepared: PreparedCopies, commit: Callable[[], None]) -> None:
        """commit: makes the adapter's weights outside the slot visible to steps."""
        self.commit = commit
        self.storage = adapter.storage()
        self._slot = slot
        self._adapter = adapter  # keeps its memory alive
        self._prepared = prepared
        self._num_done = 0

    def advance(self, max_bytes: int) -> bool:
        """Copy a piece; return whether it was the last."""
        copies = self._prepared.copies
        if self._num_done < copies.num_copies:
            end = copies.end_of(self._num_done, max_bytes)
            copies.run(self._slot, self._num_done, end, self.storage)
            self._num_done = end
        return self._num_done == copies.num_copies

    def run_from(self, staged: torch.Tensor) -> None:
        """Copy everything; sources in `storage` are read from their copy in `staged`. `advance` then returns true."""
        self._prepared.copies.run_from(self._slot, staged)
        self._num_done = self._prepared.copies.num_copies
