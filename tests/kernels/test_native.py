"""How the C++ kernels are loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from lorafleet.kernels.norm import rms_norm


def test_one_openmp_runtime_serves_torch_and_the_kernels() -> None:
    rms_norm(torch.randn(64, 64), torch.ones(64), 1e-5)
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in lines if "gomp" in line}) == 1


def test_without_a_compiler_the_references_run_after_one_warning(tmp_path: Path) -> None:
    code = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from lorafleet.kernels.norm import rms_norm
    for _ in range(3):
        y = rms_norm(torch.ones(2, 4), torch.ones(4), 0.0)
assert torch.equal(y, torch.ones(2, 4))
ours = [str(w.message) for w in caught if "LoRAFleet" in str(w.message)]
assert len(ours) == 1 and "compiler" in ours[0], ours
"""
    environment = {"PATH": "/nonexistent", "LORAFLEET_CACHE": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
