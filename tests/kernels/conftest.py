"""What tests of several kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lorafleet.kernels.build import Level, supported_levels
from lorafleet.kernels.native import forced, library


@pytest.fixture(params=supported_levels(), ids=lambda level: level.name, scope="module")
def each_level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test once for each instruction set that this machine has."""
    level: Level = request.param
    with forced(level):
        assert library() is not None
        yield
