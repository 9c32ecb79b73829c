"""Sizes with units."""

from __future__ import annotations

import argparse

import pytest

from lorafleet.controller.arguments.byte_size import byte_size


@pytest.mark.parametrize(("text", "num_bytes"), [("1.5GiB", 3 << 29), (" 500 MB ", 500_000_000), ("7", 7)])
def test_a_size_has_a_number_and_perhaps_a_unit(text: str, num_bytes: int) -> None:
    assert byte_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.5.5", "1e9", "9" * 5000, "1 GiB GiB"])
def test_an_invalid_size_is_refused_briefly(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        byte_size(text)
    assert len(str(refused.value)) < 300
