"""Adapters that a worker's requests need."""

from __future__ import annotations

import pytest

from lorafleet.workers.server import adapter_use
from lorafleet.workers.server.adapter_use import AdapterUse

ALL = ["a", "b", "c"]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_adapter_is_used_until_the_last_request_that_names_it_has_ended() -> None:
    use = AdapterUse(Clock())
    use.begin("one", ["a"])
    use.begin("two", ["a", "b"])
    use.begin("base", [])
    assert use.used(ALL, 60.0) == ["a", "b"]
    use.end("one")
    assert use.used(ALL, 60.0) == ["a", "b"]
    use.end("two")
    use.end("two")
    use.end("base")
    assert use.used(ALL, 60.0) == []


def test_what_was_cut_may_come_back_for_a_while() -> None:
    clock = Clock()
    use = AdapterUse(clock)
    use.begin("one", ["a"])
    use.cut("one")
    clock.now += 60.0
    assert use.used(ALL, 60.0) == ["a"]
    clock.now += 0.1
    assert use.used(ALL, 60.0) == []
    assert use.used(ALL, 100.0) == ["a"], "who asks knows how long a request waits"


def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_use, "MAX_CUT", 2)
    use = AdapterUse(Clock())
    for digest in ALL:
        use.begin(digest, [digest])
        use.cut(digest)
    assert use.used(ALL, 60.0) == ["b", "c"]
