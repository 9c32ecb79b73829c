"""Threads that share a job: one that is descheduled in the middle of a block delays nobody and corrupts nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lorafleet.kernels.build import SOURCES

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_block_of_a_thread_that_is_put_off_is_computed_by_another_and_counts_once(tmp_path: Path) -> None:
    assert COMPILER is not None
    program = tmp_path / "team_check"
    sources = [str(Path(__file__).with_name("team_check.cpp")), str(SOURCES / "team.cpp")]
    command = [COMPILER, "-std=c++17", "-O1", "-pthread", f"-I{SOURCES}", "-o", str(program), *sources]
    subprocess.run(command, check=True, timeout=120)
    said = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert (said.returncode, said.stdout) == (0, "ok\n")
