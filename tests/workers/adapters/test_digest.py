"""A file's stamp is proof: any write after the stamp settled changes it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafleet.workers.adapters.digest import FileStamp


def stamp_of(path: Path) -> FileStamp:
    with path.open("rb") as file:
        return FileStamp.of(file)


def settled(path: Path) -> FileStamp:
    stamp = stamp_of(path)
    assert stamp.settle()
    return stamp


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"B")


def overwrite_and_forge_the_time(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    before = path.stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [overwrite, overwrite_and_forge_the_time, replace])
def test_a_change_after_the_stamp_settled_shows(change: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"AAAA")
    stamp = settled(path)
    change(path)
    assert stamp_of(path) != stamp


def test_reading_does_not_show(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"AAAA")
    stamp = settled(path)
    path.read_bytes()
    assert stamp_of(path) == stamp


def test_a_recent_change_is_waited_out_and_an_old_one_is_not() -> None:
    now_ns = time.time_ns() | 1
    assert FileStamp(1, 1, 1, now_ns, now_ns).settle()
    assert time.time_ns() - now_ns >= 20_000_000
    began_s = time.monotonic()
    for _ in range(100):
        assert FileStamp(1, 1, 1, now_ns, now_ns).settle()
    assert time.monotonic() - began_s < 1.0, "20 ms each would be 2 s"


def test_a_stamp_of_whole_seconds_or_of_a_clock_ahead_of_ours_proves_nothing() -> None:
    whole_ns = 1_700_000_000 * 10**9
    ahead_ns = time.time_ns() + 5 * 10**9 | 1
    assert not FileStamp(1, 1, 1, whole_ns, whole_ns).settle()
    assert not FileStamp(1, 1, 1, ahead_ns, ahead_ns).settle()
    assert FileStamp(1, 1, 1, whole_ns, whole_ns + 1).settle()
