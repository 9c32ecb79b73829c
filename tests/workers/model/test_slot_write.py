"""What is prepared once for an adapter, and that it keeps no adapter in memory."""

from __future__ import annotations

import gc
import weakref

import torch

from lorafleet.workers.adapters.format import HostAdapter, LinearChange
from lorafleet.workers.model import slot_write
from lorafleet.workers.model.slot_write import PreparedAdapters, SlotRows, SlotWrite


def make_adapter(value: float) -> HostAdapter:
    change = LinearChange(torch.full((2, 8), value), torch.full((2, 4), value), 1.0)
    return HostAdapter("digest", {(0, "q_proj"): change}, num_bytes=96)


def prepare(adapter: HostAdapter, places: torch.Tensor, numbers: torch.Tensor) -> SlotRows:
    rows = SlotRows()
    rows.add(places, adapter.weights[0, "q_proj"].a_RI)
    rows.add_numbers(numbers.transpose(0, 1), [2], [0.5], [0])
    return rows


def test_pieces_come_to_the_whole_and_numbers_keep_their_bits() -> None:
    places, numbers = torch.zeros(3, 2, 8), torch.zeros(3, 3, 1, dtype=torch.int32)
    adapter = make_adapter(7.0)
    done: list[str] = []
    write = SlotWrite(1, adapter, prepare(adapter, places, numbers).copies(), lambda: done.append("committed"))
    assert not write.advance(max_bytes=1)
    assert write.advance(max_bytes=1)
    write.commit()
    assert done == ["committed"]
    assert places[1].eq(7.0).all() and not places[[0, 2]].any()
    assert (numbers[0, 1].item(), numbers[1].view(torch.float32)[1].item(), numbers[2, 1].item()) == (2, 0.5, 0)


def test_what_is_known_of_an_adapter_is_its_own_and_does_not_keep_it() -> None:
    places, numbers = torch.zeros(3, 2, 8), torch.zeros(3, 3, 1, dtype=torch.int32)
    known = PreparedAdapters()
    adapter, twin = make_adapter(1.0), make_adapter(1.0)
    prepared = prepare(adapter, places, numbers).copies()
    known.put(adapter, prepared)
    assert known.get(adapter) is prepared
    assert known.get(twin) is None
    memory = weakref.ref(adapter.weights[0, "q_proj"].a_RI)
    del adapter
    gc.collect()
    assert memory() is None, "the weights are gone with their adapter"
    assert not known._known


def test_only_those_prepared_last_are_known() -> None:
    places, numbers = torch.zeros(3, 2, 8), torch.zeros(3, 3, 1, dtype=torch.int32)
    known = PreparedAdapters()
    adapters = [make_adapter(1.0) for _ in range(slot_write._MAX_PREPARED + 1)]
    for adapter in adapters:
        known.put(adapter, prepare(adapter, places, numbers).copies())
    assert known.get(adapters[0]) is None
    assert all(known.get(adapter) is not None for adapter in adapters[1:])
