"""The tiers of a worker's adapters, reported and expected."""

from __future__ import annotations

from lorafleet.controller.gateway.routing.adapter_tiers import AdapterTiers
from lorafleet.controller.gateway.routing.worker_view import Tier


def test_heartbeats_tell_what_has_changed() -> None:
    residents = AdapterTiers()
    residents.update([("a", Tier.DISK), ("b", Tier.DEVICE), ("c", Tier.HOST)])
    assert residents.tiers == {"a": Tier.DISK, "b": Tier.DEVICE, "c": Tier.HOST}
    assert residents.num_on_device == 1
    residents.update([("a", Tier.DEVICE), ("b", Tier.HOST), ("c", Tier.ABSENT), ("d", Tier.DEVICE)])
    assert residents.tiers == {"a": Tier.DEVICE, "b": Tier.HOST, "d": Tier.DEVICE}
    assert residents.num_on_device == 2
    residents.clear()
    assert residents.tiers == {}
    assert residents.num_on_device == 0


def test_a_requests_adapter_is_expected_in_a_slot_until_two_heartbeats_have_arrived() -> None:
    residents = AdapterTiers()
    residents.update([("a", Tier.DISK)])
    residents.expect(["a", "b"])
    residents.expect(["c"])
    for _ in range(2):
        assert residents.expected == {"a", "b", "c"}
        residents.update([])
    assert residents.expected == set()
    residents.expect(["a"])
    residents.clear()
    assert residents.expected == set()
