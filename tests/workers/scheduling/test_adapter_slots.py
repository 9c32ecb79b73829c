"""Slots and the pool next to them as tables: which adapter is evicted for another, and the memory freed."""

from __future__ import annotations

from lorafleet.workers.scheduling.adapter_slots import AdapterSlots
from lorafleet.workers.scheduling.eviction import make_eviction

SIZES = {"half": 5, "third": 3, "all": 10}


def filled(num_slots: int, *digests: str) -> AdapterSlots:
    """Return slots that are all ready, the first the least recently used."""
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
    slots.acquire("half")
    assert slots.start_load("all") is None
    assert slots.resident() == ("third", "half") and slots.take_emptied() == []
    slots.release("half")
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


def test_the_adapters_to_replace_are_those_that_hold_what_is_lacking() -> None:
    slots = filled(5, "half", "plain", "third")
    slots.acquire("plain")
    slots.acquire("half")
    assert slots.lacks_bytes("all") and not slots.lacks_bytes("other plain")
    assert slots.blockers("all") == ["third", "half"] and slots.obstacles("all") == ("half",)
    assert slots.blockers("other plain") == ["third", "plain", "half"]
    assert slots.obstacles("other plain") == ("plain", "half")


def test_what_is_to_be_kept_or_to_stay_is_not_evicted() -> None:
    slots = filled(2, "a", "b")
    assert slots.start_load("c", keep={"a", "b"}) is None
    slots.pin("a", True)
    assert slots.blockers("c") == ["b"]
    assert slots.start_load("c") is not None
    slots.finish_load("c")
    assert slots.resident() == ("a", "c")
    slots.pin("a", False)
    slots.start_load("d")
    assert slots.resident() == ("c",)


def test_a_dropped_adapter_leaves_its_slot_and_its_bytes() -> None:
    slots = filled(2, "half", "plain")
    emptied = slots.slot_of("half")
    assert (slots.drop("half"), slots.drop("plain"), slots.drop("plain")) == (5, 0, None)
    slots.check_integrity()
    assert emptied in slots.take_emptied()
    assert slots.start_load("all") is not None


def test_by_cost_what_was_used_often_stays() -> None:
    slots = AdapterSlots(2, eviction=make_eviction("cost"))
    for digest in ("often", "once"):
        slots.start_load(digest)
        slots.finish_load(digest, 0.01)
    for _ in range(3):
        slots.acquire("often")
        slots.release("often")
    slots.acquire("once")
    slots.release("once")
    assert slots.start_load("new") is not None
    assert slots.resident() == ("often",)


def test_several_are_loaded_all_or_none() -> None:
    slots = filled(3, "a", "b")
    slots.acquire("a")
    assert slots.num_lacking(3) == 1 and slots.start_loads(["x", "y", "z"]) is None
    assert slots.num_lacking(2, keep={"b"}) == 1 and slots.start_loads(["x", "y"], keep={"b"}) is None
    assert slots.resident() == ("b", "a") and slots.take_emptied() == []
    loaded = slots.start_loads(["x", "y"])
    slots.check_integrity()
    assert loaded is not None and len(set(loaded)) == 2
    assert slots.resident() == ("a",) and slots.occupants() == {"a", "x", "y"}


def test_busy_adapters_weigh_more_in_how_many_requests_an_adapter_usually_has() -> None:
    slots = AdapterSlots(2)
    assert slots.usual_uses == 0.0
    for digest, num_uses in (("busy", 7), ("idle", 1)):
        slots.start_load(digest)
        slots.finish_load(digest)
        for _ in range(num_uses):
            slots.acquire(digest)
    assert slots.usual_uses == (49 + 1) / 8
