"""Fixtures shared by the tests of the worker's gRPC service."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from fake_worker import Worker, serve_worker


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with serve_worker() as served:
        yield served
