"""Files that stay open while requests name their adapter."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
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
    return AdapterSpec(
        digest="digest",
        path=directory,
        config=AdapterConfig(base_model_name=None, lora_rank=1, lora_alpha=1.0, use_rslora=False),
        lora_rank=1,
        num_elements=0,
        files=tuple(files),
    )


def contents(adapter: OpenAdapter | None) -> list[bytes]:
    assert adapter is not None
    return [os.pread(file.fileno(), 10, 0) for file in adapter.files]


def replace(path: Path) -> None:
    (path.parent / "new").write_bytes(b"new")
    (path.parent / "new").replace(path)


def hold(files: OpenFiles, digest: str, specs: Sequence[AdapterSpec]) -> OpenAdapter | None:
    return files.hold(digest, specs).result(TIMEOUT_S)


@pytest.mark.parametrize("stamped", [True, False])
def test_what_is_held_is_read_as_it_was_until_the_last_release(tmp_path: Path, stamped: bool) -> None:
    spec, files = make_spec(tmp_path / "a", 2, stamped=stamped), OpenFiles()
    hold(files, "digest", [spec])
    hold(files, "digest", [spec])
    replace(spec.path / "0")
    (spec.path / "1").unlink()
    files.release("digest")
    with files.borrow("digest") as adapter:
        assert contents(adapter) == [b"old", b"old"]
    assert files.num_files() == 2
    files.release("digest")
    assert files.num_files() == 0
    with files.borrow("digest") as nothing:
        assert nothing is None
    files.close()
    assert adapter is not None and all(file.closed for file in adapter.files)


def test_a_reader_keeps_what_the_last_request_lets_go(tmp_path: Path) -> None:
    files = OpenFiles()
    hold(files, "digest", [make_spec(tmp_path / "a")])
    with files.borrow("digest") as adapter:
        files.release("digest")
        assert contents(adapter) == [b"old"]
    assert files.num_files() == 0
    files.close()


def test_the_first_place_where_it_still_is_is_held(tmp_path: Path) -> None:
    specs = [make_spec(tmp_path / name) for name in "abc"]
    (specs[0].path / "0").unlink()
    replace(specs[1].path / "0")
    files = OpenFiles()
    held = hold(files, "digest", specs)
    assert held is not None and held.spec is specs[2]
    files.release("digest")
    assert hold(files, "digest", specs[:2]) is None
    files.release("digest")
    assert files.num_files() == 0
    files.close()


def test_beyond_the_bound_none_is_opened(tmp_path: Path) -> None:
    files = OpenFiles(max_files=2)
    for name in "abc":
        hold(files, name, [make_spec(tmp_path / name)])
    assert files.num_files() == 2
    with files.borrow("c") as adapter:
        assert adapter is None
    for name in "abc":
        files.release(name)
    hold(files, "c", [make_spec(tmp_path / "c")])
    assert files.num_files() == 1
    files.close()


class SlowDisk:
    """Opens files when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.opened: list[OpenAdapter | None] = []
        self._open = open_files._open_first
        monkeypatch.setattr(open_files, "_open_first", self.open)

    def open(self, specs: Sequence[AdapterSpec]) -> OpenAdapter | None:
        self.begun.set()
        assert self.may_go_on.wait(TIMEOUT_S)
        self.opened.append(self._open(specs))
        return self.opened[-1]


def test_nobody_waits_for_a_file_system_and_it_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, spec, files = SlowDisk(monkeypatch), make_spec(tmp_path / "a"), OpenFiles()
    one, other = files.hold("digest", [spec]), files.hold("digest", [spec])
    assert disk.begun.wait(TIMEOUT_S)
    assert not one.done() and other is one
    disk.may_go_on.set()
    assert contents(one.result(TIMEOUT_S)) == [b"old"]
    assert len(disk.opened) == files.num_files() == 1
    files.release("digest")
    files.release("digest")
    files.close()


def test_files_that_open_after_all_have_let_go_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, spec, files = SlowDisk(monkeypatch), make_spec(tmp_path / "a"), OpenFiles()
    opened = files.hold("digest", [spec])
    assert disk.begun.wait(TIMEOUT_S)
    files.release("digest")
    assert files.num_files() == 0
    disk.may_go_on.set()
    assert opened.result(TIMEOUT_S) is None
    files.close()
    (adapter,) = disk.opened
    assert adapter is not None and adapter.files[0].closed


def test_files_that_never_open_count_as_gone_and_others_open_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    open_first = open_files._open_first

    def open_some(specs: Sequence[AdapterSpec]) -> OpenAdapter | None:
        if specs[0].path.name.startswith("hung"):
            hangs.wait(TIMEOUT_S)
        return open_first(specs)

    monkeypatch.setattr(open_files, "_open_first", open_some)
    files = OpenFiles(limit_s=0.05)
    hung = [files.hold(name, [make_spec(tmp_path / name)]) for name in ("hung 1", "hung 2", "hung 3")]
    assert contents(hold(files, "fine", [make_spec(tmp_path / "fine")])) == [b"old"]
    assert [opened.result(TIMEOUT_S) for opened in hung] == [None] * 3
    assert files.num_files() == 1
    assert files._threads.num_given_up == 3
    for _ in range(5):
        files.release("hung 1")
        assert hold(files, "hung 1", [make_spec(tmp_path / "hung 1")]) is None
    assert files._threads.num_given_up == 3, "what hangs is not opened again"
    hangs.set()
    files.close()
