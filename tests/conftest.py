"""Fixtures that tests of every folder share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Without a GPU, Triton's kernels run in its interpreter. Triton decides that at its import, which torch may trigger.
if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"

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
