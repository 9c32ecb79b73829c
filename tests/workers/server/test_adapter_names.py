"""Names of adapters, reported in any order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.proto import worker_pb2
from lorafleet.workers.server import adapter_names
from lorafleet.workers.server.adapter_names import AdapterNames


def adapter(name: str, version: int, digest: str = "", *, created: int = 0) -> worker_pb2.Adapter:
    return worker_pb2.Adapter(name=name, version=version, digest=digest, created=created, unloaded=not digest)


VERSIONS = st.builds(
    adapter, st.sampled_from("ab"), st.integers(1, 4), st.sampled_from(["", "d1", "d2"]), created=st.integers(0, 2)
)


@given(st.lists(VERSIONS, max_size=12), st.randoms())
def test_the_order_and_how_often_does_not_matter(told: list[worker_pb2.Adapter], random: object) -> None:
    one, other = AdapterNames(), AdapterNames()
    one.note(told)
    shuffled = told * 2
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other.note(shuffled)
    for name in "ab":
        assert one.get(name) == other.get(name)
        newest = max((told_one.version for told_one in told if told_one.name == name), default=None)
        known = one.get(name)
        assert (known.version if known is not None else None) == newest


def test_only_what_is_newer_is_a_change() -> None:
    names = AdapterNames()
    assert names.note([adapter("sql", 2, "d2")])
    assert not names.note([adapter("sql", 2, "d2"), adapter("sql", 1, "d1"), adapter("sql", 1)])
    assert [known.digest for known in names.loaded()] == ["d2"]
    assert names.note([adapter("sql", 3)])
    assert names.loaded() == [] and [known.unloaded for known in names.all()] == [True]
    assert names.note([adapter("sql", 4, "d4")])
    assert [known.digest for known in names.loaded()] == ["d4"]


def test_of_one_version_what_was_read_first_counts() -> None:
    """A start-up adapter whose files changed before another worker read them."""
    names = AdapterNames()
    names.note([adapter("sql", 1, "changed", created=20)])
    assert names.note([adapter("sql", 1, "served", created=10)])
    assert not names.note([adapter("sql", 1, "changed", created=20)])
    assert [known.digest for known in names.loaded()] == ["served"]


def test_unloaded_names_are_forgotten_in_the_end_but_for_those_of_the_start_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapter_names, "MAX_UNLOADED", 3)
    names = AdapterNames(["start"])
    names.note([adapter("kept", 5, "d"), adapter("start", 6)])
    names.note([adapter(f"a{number}", 10 + number) for number in range(5)])
    names.note([adapter("a4", 20, "d")])
    assert sorted(known.name for known in names.all()) == ["a2", "a3", "a4", "kept", "start"]
