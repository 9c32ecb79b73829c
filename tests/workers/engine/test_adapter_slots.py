"""Slots and the pool beside them as tables: who is evicted for whom, and what is freed."""

from __future__ import annotations

from lorafleet.workers.engine.adapter_slots import AdapterSlots

SIZES = {"half": 5, "third": 3, "all": 10}


def filled(num_slots: int, *digests: str) -> AdapterSlots:
    """All ready, the first the least recently used."""
    slots = AdapterSlots(num_slots, max_bytes=10, bytes_of=lambda digest: SIZES.get(digest, 0))
    for digest in digests:
        assert slots.start_load(digest) is not None
        slots.finish_load(digest)
    slots.check_integrity()
    return slots


def test_a_slot_that_is_free_is_taken_and_none_is_emptied() -> None:
    slots = filled(3, "plain", "half")
    assert slots.start_load("third") is not None
    slots.check_integrity()
    assert slots.resident() == ("plain", "half") and slots.take_emptied() == []


def test_for_bytes_only_adapters_that_have_some_are_evicted_and_no_more_than_needed() -> None:
    slots = filled(5, "plain", "half", "third")
    emptied = slots.slot_of("half")
    assert slots.start_load("all") is not None
    slots.check_integrity()
    assert slots.resident() == ("plain",)
    assert emptied in slots.take_emptied() and slots.take_emptied() == []
    slots = filled(5, "third", "plain", "half")
    SIZES["a bit more"] = 4
    slots.start_load("a bit more")
    assert slots.resident() == ("plain", "half"), "the least recently used was enough"


def test_nothing_is_evicted_where_it_would_not_be_enough() -> None:
    slots = filled(5, "half", "third")
    slots.pin("half")
    assert slots.start_load("all") is None
    assert slots.resident() == ("third", "half") and slots.take_emptied() == []
    slots.unpin("half")
    assert slots.start_load("all") is not None


def test_what_is_loading_holds_its_bytes_until_it_fails() -> None:
    slots = filled(5, "half")
    assert slots.start_load("third") is not None
    assert slots.start_load("all") is None
    slots.fail_load("third")
    slots.check_integrity()
    assert slots.start_load("all") is not None
    assert slots.resident() == () and len(slots.take_emptied()) == 2


def test_a_plain_adapter_asks_for_a_slot_alone() -> None:
    slots = filled(2, "half", "third")
    assert slots.start_load("plain") is not None
    assert slots.resident() == ("third",), "the least recently used"


def test_who_is_in_the_way_is_those_that_hold_the_bytes_and_go_soonest() -> None:
    slots = filled(5, "half", "plain", "third")
    for digest in ("plain", "half", "third"):
        slots.pin(digest)
    remaining = {"plain": 1, "half": 9, "third": 4}
    assert slots.in_the_way("all", remaining.__getitem__, ()) == ["third", "half"]
    assert slots.in_the_way("all", remaining.__getitem__, {"third"}) == ["half"]
    assert slots.in_the_way("other plain", remaining.__getitem__, ()) == ["plain"]
