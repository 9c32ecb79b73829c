"""Work by name: in order for one name, side by side for different ones; an abandoned job has no late effect."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from lorafleet.workers.adapters.named_work import NamedWork
from lorafleet.workers.errors import AdapterUnavailableError, DrainingError

TIMEOUT_S = 20.0


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def work() -> Iterator[NamedWork[str]]:
    work: NamedWork[str] = NamedWork()
    yield work
    work.close()


def behind(gate: threading.Event, value: str) -> Callable[[], str]:
    def read() -> str:
        assert gate.wait(TIMEOUT_S)
        return value

    return read


def test_one_names_work_is_done_in_order(work: NamedWork[str], gate: threading.Event) -> None:
    done: list[str] = []
    futures = [
        work.submit("x", behind(gate, "first"), done.append, limit_s=TIMEOUT_S),
        *(work.submit("x", lambda n=n: f"{n}", done.append, limit_s=TIMEOUT_S) for n in range(5)),  # type: ignore[misc]
    ]
    gate.set()
    for future in futures:
        future.result(TIMEOUT_S)
    assert done == ["first", "0", "1", "2", "3", "4"]


def test_other_names_go_on_while_many_are_slow(work: NamedWork[str], gate: threading.Event) -> None:
    slow = [work.submit(f"slow {n}", behind(gate, "late"), str, limit_s=TIMEOUT_S) for n in range(10)]
    assert work.submit("other", lambda: "now", str, limit_s=TIMEOUT_S).result(TIMEOUT_S) == "now"
    assert not any(future.done() for future in slow)
    gate.set()
    assert [future.result(TIMEOUT_S) for future in slow] == ["late"] * 10


def test_what_was_given_up_changes_nothing_when_it_ends_and_the_next_begins(
    work: NamedWork[str], gate: threading.Event
) -> None:
    changes: list[str] = []
    ended = threading.Event()

    def hangs() -> str:
        assert gate.wait(TIMEOUT_S)
        ended.set()
        return "late"

    hung = work.submit("x", hangs, changes.append, limit_s=0.05)
    following = work.submit("x", lambda: "next", changes.append, limit_s=TIMEOUT_S)
    with pytest.raises(AdapterUnavailableError, match="given up"):
        hung.result(TIMEOUT_S)
    following.result(TIMEOUT_S)
    gate.set()
    assert ended.wait(TIMEOUT_S)
    work.close()
    assert changes == ["next"]


def test_an_error_of_either_part_is_the_futures_and_the_next_goes_on(work: NamedWork[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        work.submit("x", lambda: 1 // 0, str, limit_s=TIMEOUT_S).result(TIMEOUT_S)
    with pytest.raises(ValueError, match="no"):
        work.submit("x", lambda: "no", int, limit_s=TIMEOUT_S).result(TIMEOUT_S)
    assert work.submit("x", lambda: "5", int, limit_s=TIMEOUT_S).result(TIMEOUT_S) == 5


def test_closing_fails_what_waits_however_much_it_is(work: NamedWork[str], gate: threading.Event) -> None:
    begun = threading.Event()

    def first() -> str:
        begun.set()
        assert gate.wait(TIMEOUT_S)
        return "done"

    futures = [work.submit("x", first, str, limit_s=TIMEOUT_S)]
    futures += [work.submit("x", lambda: "never", str, limit_s=TIMEOUT_S) for _ in range(3000)]
    assert begun.wait(TIMEOUT_S)
    closer = threading.Thread(target=work.close, daemon=True)
    closer.start()
    for future in futures[1:]:
        assert isinstance(future.exception(TIMEOUT_S), DrainingError)
    gate.set()
    closer.join(TIMEOUT_S)
    assert futures[0].result(TIMEOUT_S) == "done"
    assert isinstance(work.submit("y", lambda: "late", str, limit_s=1.0).exception(TIMEOUT_S), DrainingError)
