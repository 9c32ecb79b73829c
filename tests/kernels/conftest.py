"""Fixtures shared by the tests of several kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch

from lorafleet.kernels.build import Level, supported_levels
from lorafleet.kernels.dispatch import forced
from lorafleet.kernels.native import library, set_threads

# Each instruction set that this machine has. Triton's kernels run in its interpreter here, and by themselves on a GPU
# (tests/gpu).
VERSIONS: list[Level | Literal["triton"]] = [*supported_levels(), "triton"]


def name_of(version: Level | Literal["triton"]) -> str:
    return version if version == "triton" else version.name


@pytest.fixture(params=VERSIONS, ids=name_of, scope="module")
def each_version(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test once for each version of the kernels."""
    version: Level | Literal["triton"] = request.param
    if version == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    with forced(version):
        assert (library() is None) == (version == "triton")
        yield


@pytest.fixture(params=supported_levels(), ids=name_of, scope="module")
def each_level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test once for each instruction set."""
    level: Level = request.param
    with forced(level):
        assert library() is not None
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _helped() -> Iterator[None]:
    """More threads than most test machines have free cores, so that they are descheduled in the middle of blocks."""
    set_threads(3)
    yield
    set_threads(1)
