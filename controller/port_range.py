"""Ranges of ports on a command line."""

from __future__ import annotations

import argparse

from lorafleet.controller.command_parser import quoted


def port_range(text: str) -> tuple[int, int]:
    """Return the first and the last port of LOW-HIGH. Raises `argparse.ArgumentTypeError`."""
    low, dash, high = text.partition("-")
    if not dash or not (low.isdecimal() and high.isdecimal()) or len(text) > 100:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not LOW-HIGH, such as 50100-50199")
    return int(low), int(high)
