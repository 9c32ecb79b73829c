"""What tests of every folder share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's directory; downloaded and converted once per machine."""
    result = subprocess.run(
        [sys.executable, "examples/demo_model.py"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    return Path(result.stdout.strip())
