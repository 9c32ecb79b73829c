"""What several tests of the endpoints share: answers in words, and a gateway with a real engine behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from real_worker import make_models, real_worker


@pytest.fixture
def says(fleet: Any, tokenizer: Any) -> Any:
    def set_answer(text: str) -> None:
        fleet.worker.answer = [*tokenizer.encode(text), fleet.worker.eos]

    return set_answer


@pytest.fixture(scope="session")
def real_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="session")
def references(real_root: Path) -> dict[str, Any]:
    """The models of transformers and peft, by name; their files are below `real_root`."""
    return make_models(real_root)


@pytest.fixture
async def real_fleet(real_root: Path, references: dict[str, Any], new_fleet: Callable[..., Any]) -> AsyncIterator[Any]:
    fleet = await new_fleet(num_workers=0, wait=False)
    async with real_worker(real_root, fleet):
        yield fleet
