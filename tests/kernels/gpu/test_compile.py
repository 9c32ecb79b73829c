"""The kernels compile for their target GPUs, which need not be present, and fit their resources."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # per program: A100; H100 and H200
SPILLED_BYTES = {80: 128, 90: 48}  # per thread: a few registers spill, outside the loops over keys
DTYPES = {80: ["bfloat16"], 90: ["bfloat16", "float32"]}
KERNELS = {
    *("_rms_norm", "_silu_mul", "_rope_kv_write", "_shrink", "_expand"),
    *("_decode", "_merge", "_prefill", "_find_best", "_pick"),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton brings NVIDIA's assembler for x86-64")
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_all_kernels_compile_and_fit(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "tests/compile_kernels.py", "--capability", str(capability), "--dtypes", *DTYPES[capability]],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0 and not result.stderr, result.stderr[-3000:]
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in compiled} == KERNELS
    for kernel in compiled:
        assert kernel["shared"] <= SHARED_BYTES[capability], kernel
        assert kernel["stack"] <= SPILLED_BYTES[capability], kernel
