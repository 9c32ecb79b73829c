"""Secrets that nobody else can read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.controller.fleet.secret_file import write_secret


def test_a_secret_is_its_owners_alone_and_never_replaces_another(tmp_path: Path) -> None:
    path = write_secret(tmp_path / "token", "secret")
    assert path.read_text() == "secret"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_secret(path, "other")
