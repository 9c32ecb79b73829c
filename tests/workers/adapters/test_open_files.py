"""Files that stay open while requests name their adapter."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorafleet.workers.adapters import open_files
from lorafleet.workers.adapters.config import AdapterConfig
from lorafleet.workers.adapters.digest import FileStamp
from lorafleet.workers.adapters.format import AdapterSpec
from lorafleet.workers.adapters.open_files import OpenAdapter, OpenFiles
from lorafleet.workers.adapters.tensor_file import Layout, TensorFile

TIMEOUT_S = 20.0


def make_spec(directory: Path, num_files: int = 1, *, stamped: bool = True) -> AdapterSpec:
    directory.mkdir(exist_ok=True)
    files = []
    for index in range(num_files):
        path = directory / f"{index}"
        path.write_bytes(b"old")
        with path.open("rb") as file:
            files.append(TensorFile(path.name, Layout((), 0), FileStamp.of(file) if stamped else None))
    return AdapterSpec("digest", directory, AdapterConfig(None, 1, 1.0, False), 1, 0, files=tuple(files))


def contents(adapter: OpenAdapter | None) -> list[bytes]:
    assert adapter is not None
    return [os.pread(file.fileno(), 10, 0) for file in adapter.files]


def replace(path: Path) -> None:
    (path.parent / "new").write_bytes(b"new")
    (path.parent / "new").replace(path)


@pytest.mark.parametrize("stamped", [True, False])
def test_what_is_held_is_read_as_it_was_until_the_last_release(tmp_path: Path, stamped: bool) -> None:
    spec, files = make_spec(tmp_path / "a", 2, stamped=stamped), OpenFiles()
    files.hold("digest", [spec])
    files.hold("digest", [spec])
    replace(spec.path / "0")
    (spec.path / "1").unlink()
    files.release("digest")
    with files.borrow("digest") as adapter:
        assert contents(adapter) == [b"old", b"old"]
    assert files.num_files() == 2
    files.release("digest")
    assert files.num_files() == 0
    assert adapter is not None and all(file.closed for file in adapter.files)
    with files.borrow("digest") as adapter:
        assert adapter is None


def test_a_reader_keeps_what_the_last_request_lets_go(tmp_path: Path) -> None:
    files = OpenFiles()
    files.hold("digest", [make_spec(tmp_path / "a")])
    with files.borrow("digest") as adapter:
        files.release("digest")
        assert contents(adapter) == [b"old"]
    assert files.num_files() == 0


def test_the_first_place_where_it_still_is_is_held(tmp_path: Path) -> None:
    specs = [make_spec(tmp_path / name) for name in "abc"]
    (specs[0].path / "0").unlink()
    replace(specs[1].path / "0")
    files = OpenFiles()
    files.hold("digest", specs)
    with files.borrow("digest") as adapter:
        assert adapter is not None and adapter.spec is specs[2]
    files.release("digest")
    files.hold("digest", specs[:2])
    with files.borrow("digest") as adapter:
        assert adapter is None
    files.release("digest")
    assert files.num_files() == 0


def test_beyond_the_bound_none_is_opened(tmp_path: Path) -> None:
    files = OpenFiles(max_files=2)
    for name in "abc":
        files.hold(name, [make_spec(tmp_path / name)])
    assert files.num_files() == 2
    with files.borrow("c") as adapter:
        assert adapter is None
    for name in "abc":
        files.release(name)
    files.hold("c", [make_spec(tmp_path / "c")])
    assert files.num_files() == 1
    files.close()


def test_two_that_open_at_once_keep_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, files = make_spec(tmp_path / "a"), OpenFiles()
    both = threading.Barrier(2)
    opened: list[OpenAdapter] = []
    open_first = open_files._open_first

    def together(specs: list[AdapterSpec]) -> OpenAdapter | None:
        adapter = open_first(specs)
        assert adapter is not None
        opened.append(adapter)
        both.wait(TIMEOUT_S)
        return adapter

    monkeypatch.setattr(open_files, "_open_first", together)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(files.hold, "digest", [spec]) for _ in range(2)]:
            done.result(TIMEOUT_S)
    assert files.num_files() == 1
    assert sorted(adapter.files[0].closed for adapter in opened) == [False, True]
    files.release("digest")
    files.release("digest")
    assert all(adapter.files[0].closed for adapter in opened)
