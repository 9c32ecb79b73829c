"""Stamps of a directory show whether it still holds what was read from it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafleet.workers.sources import directory_stamp
from lorafleet.workers.sources.directory_stamp import DirectoryStamp

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / WEIGHTS).write_bytes(b"old weights")
    (directory / CONFIG).write_text("{}")
    return directory


def overwrite(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes(b"new weights")


def overwrite_and_set_the_time_back(adapter: Path) -> None:
    stat = (adapter / WEIGHTS).stat()
    overwrite(adapter)
    os.utime(adapter / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace(adapter: Path) -> None:
    (adapter / "new").write_bytes(b"new weights")
    (adapter / "new").replace(adapter / WEIGHTS)


def replace_all(adapter: Path) -> None:
    shutil.copytree(adapter, adapter.parent / "new")
    shutil.rmtree(adapter)
    (adapter.parent / "new").rename(adapter)


def change_the_config(adapter: Path) -> None:
    (adapter / CONFIG).write_text('{"lora_alpha": 1}')


def add_a_tokenizer(adapter: Path) -> None:
    (adapter / "tokenizer.json").write_text("{}")


def remove_the_weights(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()


def of(path: Path) -> DirectoryStamp:
    stamp = DirectoryStamp.of(str(path))
    assert stamp is not None and stamp.is_proof
    return stamp


@pytest.mark.parametrize(
    "change",
    [
        overwrite,
        overwrite_and_set_the_time_back,
        replace,
        replace_all,
        change_the_config,
        add_a_tokenizer,
        remove_the_weights,
    ],
)
def test_every_change_of_what_an_adapter_is_made_of_shows(change: Callable[[Path], None], adapter: Path) -> None:
    before = of(adapter)
    assert of(adapter) == before
    change(adapter)
    assert of(adapter) != before


def test_what_an_adapter_is_not_made_of_does_not_count(adapter: Path) -> None:
    before = of(adapter)
    (adapter / "training.log").write_text("step 5")
    (adapter / "optimizer.pt").write_bytes(b"state")
    assert of(adapter) == before


def test_a_link_that_points_elsewhere_is_a_change(adapter: Path) -> None:
    other = adapter.parent / "other"
    shutil.copytree(adapter, other)
    latest = adapter.parent / "latest"
    latest.symlink_to(adapter)
    before = of(latest)
    assert before == of(adapter)
    latest.unlink()
    latest.symlink_to(other)
    assert of(latest) != before


def test_a_hub_cache_folder_is_its_snapshot(adapter: Path) -> None:
    folder = adapter.parent / "models--org--name"
    shutil.copytree(adapter, folder / "snapshots" / "one")
    shutil.copytree(adapter, folder / "snapshots" / "two")
    (folder / "refs").mkdir()
    stamps = []
    for snapshot in ("one", "two"):
        (folder / "refs" / "main").write_text(snapshot)
        stamps.append(of(folder))
    assert stamps == [of(folder / "snapshots" / "one"), of(folder / "snapshots" / "two")]


@pytest.mark.parametrize("path", ["org/name", "/no/such/directory", "~nobody-of-this-name/a", "a\0b", "x" * 5000])
def test_where_no_directory_is_there_is_no_stamp(path: str) -> None:
    assert DirectoryStamp.of(path) is None


def test_a_change_that_is_too_young_proves_nothing(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_stamp, "_TICK_NS", 10**15)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    stamp = DirectoryStamp.of(str(adapter))
    assert stamp is not None and not stamp.is_proof


@pytest.mark.parametrize(
    ("changed_ns", "age_ns", "is_old"),
    [
        (5_000_000_001, 30_000_000, True),
        (5_000_000_001, 10_000_000, False),
        (5_000_000_000, 30_000_000, False),  # whole seconds: perhaps the clock has no others
        (5_000_000_000, 3_000_000_000, True),
        (5_000_000_001, -1, False),  # a clock that is ahead
    ],
)
def test_how_old_a_change_must_be(changed_ns: int, age_ns: int, is_old: bool) -> None:
    assert directory_stamp._is_old(changed_ns, changed_ns + age_ns) == is_old
