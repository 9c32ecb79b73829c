"""Ranges of ports as they are written."""

from __future__ import annotations

import argparse

import pytest

from lorafleet.controller.port_range import port_range


def test_both_ends_are_read() -> None:
    assert port_range("50100-50199") == (50100, 50199)


@pytest.mark.parametrize("text", ["", "-", "50100", "a-b", "1-2-3", "-1-5", "1-" + "9" * 5000])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not LOW-HIGH") as caught:
        port_range(text)
    assert len(str(caught.value)) < 300
