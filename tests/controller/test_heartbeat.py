"""Signs of life over a pipe, and how their absence is measured."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lorafleet.controller.heartbeat import Pulse, beat


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Return (read end, write end) of a pipe."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_silence_is_measured_from_the_last_sign(pipe: tuple[int, int]) -> None:
    pulse = Pulse(pipe[0], now=0.0)
    assert not pulse.has_beaten
    assert [pulse.look(now) for now in (0.5, 1.0, 1.5)] == [0.5, 1.0, 1.5]
    beat(pipe[1])
    beat(pipe[1])
    assert pulse.look(2.0) == 0.0
    assert pulse.has_beaten
    assert pulse.look(2.5) == 0.5


def test_time_in_which_the_reader_did_not_run_is_no_silence(pipe: tuple[int, int]) -> None:
    pulse = Pulse(pipe[0], now=0.0)
    assert pulse.look(3600.0) == 1.0


def test_words_between_the_signs_are_kept(pipe: tuple[int, int]) -> None:
    pulse = Pulse(pipe[0], now=0.0)
    for text in (b"\n", b"gateway listen", b"ing on 8000\n", b"\n" * 10_000):
        os.write(pipe[1], text)
        pulse.look(1.0)
    assert pulse.has_said(b"listening") and not pulse.has_said(b"draining")


def test_a_writer_never_waits_for_its_reader(pipe: tuple[int, int]) -> None:
    for _ in range(100_000):  # more than a pipe holds
        beat(pipe[1])


def test_a_writer_outlives_its_reader() -> None:
    read, write = os.pipe()
    os.close(read)
    beat(write)
    os.close(write)
