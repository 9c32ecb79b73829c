"""The directory of caches that are kept between runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.kernels.cache import cache_root


@pytest.mark.parametrize(
    ("variable", "root"), [(None, "home/.cache/lorafleet"), ("", "home/.cache/lorafleet"), ("x", "x")]
)
def test_the_variable_names_it_or_it_lies_in_the_home(
    variable: str | None, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LORAFLEET_CACHE", raising=False)
    if variable is not None:
        monkeypatch.setenv("LORAFLEET_CACHE", variable and str(tmp_path / variable))
    assert cache_root() == tmp_path / root
