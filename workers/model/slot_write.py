"""An adapter on its way into a slot: prepared on another thread, copied in pieces between steps.

Preparing does what takes long or Python (where each row goes, DoRA's norms, memory beside the slot). What is left for
the thread that makes the steps is moving bytes.
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
    """Collects what is copied to a slot. Numbers of a linear are gathered into one tensor for the whole adapter."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._own: list[torch.Tensor] = []  # sources that are nobody else's
        self._places_of_numbers: list[torch.Tensor] = []
        self._numbers = bytearray()

    def add(self, place_L: torch.Tensor, source: torch.Tensor, *, is_own: bool = False) -> None:
        """Behind the slots' dimension `place_L` has the shape of `source`, which is the adapter's or the model's.

        is_own: it is neither's.
        """
        if source.dtype != place_L.dtype:
            source, is_own = source.to(place_L.dtype), True
        if is_own:
            self._own.append(source)
        self._pairs.append((place_L, source))

    def add_numbers(
        self, place_L3N: torch.Tensor, ranks: Sequence[int], scalings: Sequence[float], affine: Sequence[int]
    ) -> None:
        """`place_L3N` is of 32-bit integers; scalings go there as they lie in memory."""
        count = len(ranks)
        self._places_of_numbers.append(place_L3N)
        self._numbers += struct.pack(f"={count}i{count}f{count}i", *ranks, *scalings, *affine)

    def copies(self, storage: torch.UntypedStorage | None) -> PreparedCopies:
        """storage: the adapter's."""
        flat = torch.frombuffer(self._numbers, dtype=torch.int32)
        parts = flat.split([place.shape[1] * place.shape[2] for place in self._places_of_numbers])
        numbers = zip(self._places_of_numbers, parts, strict=True)
        copies = Copies([*self._pairs, *((place, part.view(place.shape[1:])) for place, part in numbers)], storage)
        return PreparedCopies(copies, (*self._own, flat))


@dataclass(frozen=True, slots=True)
class PreparedCopies:
    """What is copied to a slot, whichever, with the sources that are not the adapter's."""

    copies: Copies
    own: tuple[torch.Tensor, ...]


class PreparedForms:
    """The copies of adapters, which take long to list, by their form; of the forms that were used last. Thread-safe.

    An adapter without a form shares its copies with no other one.
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
        if form is None or not prepared.copies.is_native:  # it knows the memory of one adapter
            return
        with self._lock:
            self._known[form] = prepared
            if len(self._known) > _MAX_FORMS:
                self._known.popitem(last=False)


class SlotWrite:
    """One adapter into one slot that no request uses. `advance` until that is true, then `commit`."""

    def __init__(self, slot: int, adapter: HostAdapter, prepared: PreparedCopies, commit: Callable[[], None]) -> None:
        """commit: lets the steps see what the adapter has beside what is copied."""
        self.commit = commit
        self.storage = adapter.storage()
        self._slot = slot
        self._adapter = adapter  # its memory is read
        self._prepared = prepared
        self._num_done = 0

    def advance(self, max_bytes: int) -> bool:
        """Copy a piece; whether that was the last."""
        copies = self._prepared.copies
        if self._num_done < copies.num_copies:
            end = copies.end_of(self._num_done, max_bytes)
            copies.run(self._slot, self._num_done, end, self.storage)
            self._num_done = end
        return self._num_done == copies.num_copies

    def run_from(self, staged: torch.Tensor) -> None:
        """Copy all, what lies in `storage` from the bytes that are `staged` in its place. `advance` is true then."""
        self._prepared.copies.run_from(self._slot, staged)
        self._num_done = self._prepared.copies.num_copies
