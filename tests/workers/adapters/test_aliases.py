"""What names stand for: content with its last name, pins with the name that asked for them. The engine is a book."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lorafleet.workers.adapters.aliases import Aliases
from lorafleet.workers.adapters.config import AdapterConfig
from lorafleet.workers.adapters.format import AdapterSpec
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.registered import FreedBytes
from lorafleet.workers.errors import AdapterConflictError, AdapterRefusedError, UnknownModelError

TIMEOUT_S = 20.0


def spec(digest: str) -> AdapterSpec:
    return AdapterSpec(
        digest=digest,
        path=Path("/adapters") / digest,
        config=AdapterConfig(base_model_name=None, lora_rank=1, lora_alpha=1.0, use_rslora=False),
        lora_rank=1,
        num_elements=1,
    )


class Book:
    """An engine that only notes what it knows. A path is its content's digest."""

    def __init__(self, max_pins: int = 1) -> None:
        self.config = SimpleNamespace(adapter_read_timeout_s=TIMEOUT_S)
        self.max_pins = max_pins
        self.registered: set[str] = set()
        self.pinned: set[str] = set()
        self.gates: dict[str, threading.Event] = {}

    def read_adapter(self, path: str, *, roots: object = None) -> AdapterSpec:
        if path in self.gates:
            assert self.gates[path].wait(TIMEOUT_S)
        if path == "broken":
            raise AdapterRefusedError("It is broken.", reason="bad")
        if path == "odd":
            raise RecursionError("maximum recursion depth exceeded")
        return spec(path)

    def add_adapter(self, added: AdapterSpec) -> None:
        self.registered.add(added.digest)

    def unregister_adapter(self, digest: str) -> Future[FreedBytes]:
        self.registered.remove(digest)
        self.pinned.discard(digest)
        freed: Future[FreedBytes] = Future()
        freed.set_result(FreedBytes(1, 1))
        return freed

    def repin_adapters(self, pin: set[str], unpin: set[str]) -> None:
        pinned = (self.pinned - unpin) | pin
        if pin and len(pinned) > self.max_pins:
            raise AdapterConflictError("Too many.")
        assert pin <= self.registered
        self.pinned = pinned


class World:
    def __init__(self, **options: Any) -> None:
        self.book = Book(**options)
        self.aliases: Aliases[tuple[str, int]] = Aliases(cast(Engine, self.book), owner=lambda key: key[0])

    def add(self, name: str, version: int, content: str, *, pin: bool = False) -> None:
        self.aliases.put((name, version), spec(content), pin=pin)
        self.check()

    def remove(self, name: str, version: int) -> Future[FreedBytes] | None:
        freed = self.aliases.remove((name, version)).result(TIMEOUT_S)
        self.check()
        return freed

    def check(self) -> None:
        assert self.book.registered == {known.digest for known in self.aliases.all().values()}
        assert self.book.pinned <= self.book.registered


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for gate in world.book.gates.values():
        gate.set()
    world.aliases.close()


def test_content_goes_with_its_last_name(world: World) -> None:
    world.add("x", 1, "a")
    world.add("y", 1, "a")
    assert world.remove("x", 1) is None
    assert world.remove("y", 1) is not None
    with pytest.raises(UnknownModelError):
        world.remove("y", 1)


def test_a_pin_goes_with_the_name_that_asked_for_it(world: World) -> None:
    world.add("plain", 1, "a")
    world.add("pinned", 1, "a", pin=True)
    assert world.book.pinned == {"a"}
    world.remove("pinned", 1)
    assert world.book.pinned == set() and world.book.registered == {"a"}
    world.add("other", 1, "b", pin=True)
    assert world.book.pinned == {"b"}


def test_two_names_that_pin_the_same_content_hold_it_until_both_are_gone(world: World) -> None:
    for name in ("one", "two"):
        world.add(name, 1, "a", pin=True)
    world.remove("one", 1)
    assert world.book.pinned == {"a"}
    world.remove("two", 1)
    assert world.book.pinned == set()


def test_a_new_version_of_a_pinned_name_has_its_pin_and_is_not_one_more(world: World) -> None:
    world.add("x", 1, "a", pin=True)
    world.add("x", 2, "b", pin=True)
    assert world.book.pinned == {"b"} and world.book.registered == {"a", "b"}
    world.remove("x", 1)
    assert world.book.pinned == {"b"}


def test_a_new_version_that_is_given_up_hands_the_pin_back(world: World) -> None:
    world.add("x", 1, "a", pin=True)
    world.add("x", 2, "b", pin=True)
    world.remove("x", 2)
    assert world.book.pinned == {"a"}


def test_a_pin_that_cannot_be_handed_back_is_lost_and_nothing_else(world: World) -> None:
    world.book.max_pins = 2
    world.add("x", 1, "a", pin=True)
    world.add("x", 2, "b", pin=True)
    world.add("y", 1, "c", pin=True)
    world.book.max_pins = 1
    world.remove("x", 2)
    assert world.book.pinned == {"c"}
    world.add("z", 1, "d")
    world.remove("y", 1)
    assert world.book.pinned == set()


def test_a_new_version_without_a_pin_leaves_the_old_one_pinned_until_it_goes(world: World) -> None:
    world.add("x", 1, "a", pin=True)
    world.add("x", 2, "b")
    assert world.book.pinned == {"a"}
    world.remove("x", 1)
    assert world.book.pinned == set()


def test_a_name_keeps_its_pin_when_other_content_takes_its_place(world: World) -> None:
    world.add("x", 1, "a")
    assert world.aliases.pin(("x", 1)) and not world.aliases.pin(("nobody", 1))
    world.add("x", 1, "b")
    assert world.book.pinned == {"b"} and world.book.registered == {"b"}


def test_a_pin_that_is_refused_leaves_everything_as_it_was(world: World) -> None:
    world.add("x", 1, "a", pin=True)
    world.add("y", 1, "b")
    with pytest.raises(AdapterConflictError):
        world.aliases.pin(("y", 1))
    with pytest.raises(AdapterConflictError):
        world.add("y", 1, "c", pin=True)
    with pytest.raises(AdapterConflictError):
        world.add("z", 1, "d", pin=True)
    world.check()
    assert {key: known.digest for key, known in world.aliases.all().items()} == {("x", 1): "a", ("y", 1): "b"}
    assert world.book.pinned == {"a"}


def test_a_refused_adapter_leaves_the_name_as_it_was(world: World) -> None:
    world.aliases.add(("x", 1), "a").result(TIMEOUT_S)
    with pytest.raises(AdapterRefusedError, match="broken"):
        world.aliases.add(("x", 1), "broken").result(TIMEOUT_S)
    with pytest.raises(AdapterRefusedError, match="RecursionError: maximum recursion") as refused:
        world.aliases.add(("x", 1), "odd").result(TIMEOUT_S)
    assert refused.value.reason == "unreadable"
    known = world.aliases.get(("x", 1))
    assert known is not None and known.digest == "a"


def test_a_removal_waits_for_the_read_of_its_own_name_alone(world: World) -> None:
    gate = world.book.gates["slow"] = threading.Event()
    adding = world.aliases.add(("x", 1), "slow")
    removing = world.aliases.remove(("x", 1))
    world.aliases.add(("y", 1), "a").result(TIMEOUT_S)
    assert world.remove("y", 1) is not None
    assert not adding.done() and not removing.done()
    gate.set()
    assert removing.result(TIMEOUT_S) is not None and adding.result(0).digest == "slow"
    world.check()


def test_names_of_one_content_that_come_and_go_at_once_never_lose_it(world: World) -> None:
    """A content that one name lets go and another one takes is registered throughout, or not at all."""
    for round_ in range(200):
        adding = [world.aliases.add((name, round_), "a") for name in "xyz"]
        removing = [world.aliases.remove((name, round_)) for name in "xyz"]
        for future in [*adding, *removing]:
            future.result(TIMEOUT_S)
        world.check()
    assert world.book.registered == set()
