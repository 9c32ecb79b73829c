"""Secrets that only their owner can read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.controller.fleet.secret_file import write_secret


def test_only_its_owner_can_read_a_secret_and_it_replaces_no_file(tmp_path: Path) -> None:
    path = write_secret(tmp_path / "token", "secret")
    assert path.read_text() == "secret"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_secret(path, "other")
