"""Files of others: only regular ones inside the roots are opened, and only up to the size limit."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafleet.workers.found_file import FoundFileError, json_object, open_found, read_found


def fails(call: Callable[[], object]) -> FoundFileError:
    with pytest.raises(FoundFileError) as caught:
        call()
    return caught.value


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NOT_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (os.mkfifo, "is a FIFO, not a file"),
    "socket": (make_socket, "is a socket, not a file"),
    "directory": (lambda path: path.mkdir(), "is a directory, not a file"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "terminal": (lambda path: path.symlink_to("/dev/tty"), "is a device, not a file"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is a link that leads nowhere"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
}


@pytest.mark.parametrize(("make", "what"), NOT_FILES.values(), ids=NOT_FILES.keys())
def test_what_is_no_file_is_refused_and_not_waited_for(
    make: Callable[[Path], object], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make(Path("x"))
    assert what in fails(lambda: read_found(tmp_path / "x", 10)).what


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "x", tmp_path / "x" / "y", tmp_path / "file" / "y"):
        with pytest.raises(FileNotFoundError):
            open_found(path)
    assert fails(lambda: open_found(tmp_path / "a\0b")).reason == "unreadable"


def test_a_fifo_that_takes_a_files_place_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The FIFO appears between the check and the opening."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(os, "stat", lambda path: os.lstat(tmp_path / "file"))
    assert fails(lambda: open_found(tmp_path / "fifo")).what == "is a FIFO, not a file"


def test_a_file_of_the_largest_size_is_read_and_a_larger_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_found(tmp_path / "x", 5) == b"12345"
    assert fails(lambda: read_found(tmp_path / "x", 4)).reason == "file_too_large"
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    assert "1,000 bytes" in fails(lambda: read_found(tmp_path / "huge", 1000)).what


def test_a_file_that_grows_while_it_is_read_is_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"12345678")
    real = os.fstat

    class Small:
        def __init__(self, descriptor: int) -> None:
            self.st_mode, self.st_size = real(descriptor).st_mode, 1

    monkeypatch.setattr(os, "fstat", Small)
    assert fails(lambda: read_found(tmp_path / "x", 4)).reason == "file_too_large"


def test_links_are_followed_inside_the_roots_alone(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    (root / "blobs").mkdir(parents=True)
    secret.write_text("secret")
    (root / "blobs" / "a").write_text("mine")
    (root / "inner").symlink_to("blobs/a")
    (root / "out").symlink_to(secret)
    (root / "twice").symlink_to("out")
    (root / "folder").symlink_to(tmp_path)
    assert read_found(root / "inner", 10, [tmp_path / "other", root]) == b"mine"
    for name in ("out", "twice", "folder/secret", "../secret"):
        error = fails(lambda name=name: read_found(root / name, 10, [root]))  # type: ignore[misc]
        assert error.reason == "outside_roots"
        assert str(tmp_path) not in error.what
        assert read_found(root / name, 10) == b"secret"


def test_a_link_that_is_changed_while_it_is_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("secret")
    (root / "mine").write_text("mine")
    (root / "x").symlink_to(tmp_path / "secret")
    real = os.open

    def change(path: Path, flags: int) -> int:
        descriptor = real(path, flags)
        (root / "x").unlink()
        (root / "x").symlink_to(root / "mine")
        return descriptor

    monkeypatch.setattr(os, "open", change)
    assert fails(lambda: open_found(root / "x", [root])).reason == "changed_while_read"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "is not JSON in UTF-8"),
        (b"\xef\xbb\xbf{}", "cannot be read as JSON"),
        (b"3", "holds int"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    ],
)
def test_what_is_no_json_object_is_said(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        json_object(data)
    assert len(str(caught.value)) < 300
