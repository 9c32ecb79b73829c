"""Compiles the Triton kernels, as the ops' calls would, for GPUs that are not here, and prints their resources.

    python tests/compile_kernels.py [--capability 90] [--dtypes bfloat16 ...]

One line of JSON for each kernel and set of compile-time arguments: registers, bytes of stack (where registers spill)
and of shared memory. Not in a process where TRITON_INTERPRET is set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lorafleet.kernels import paged_kv
from lorafleet.kernels.activation import silu_mul
from lorafleet.kernels.attention import paged_attention
from lorafleet.kernels.dispatch import forced
from lorafleet.kernels.lora import LoraSegments, LoraSlots, lora_add_
from lorafleet.kernels.norm import fused_add_rms_norm_, rms_norm
from lorafleet.kernels.rope import rope_kv_write_
from lorafleet.kernels.sampling import sample_tokens

CPU = torch.device("cpu")


class _NoDevice:
    """Stands in for Triton's driver: enough to compile, but not to run."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Make launches only compile within the block; the list fills with (name, kernel)."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not known for _, known in kernels):
            kernels.append((self.__name__, kernel))
        return kernel

    driver.set_active(_NoDevice(capability))
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run


def call_everything(dtype: torch.dtype, num_q_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Call each op for a decode step and for one with prompts; the arguments' memory is not read."""
    hidden, inner, page, vocab_size = num_q_heads * head_dim, 2 * num_q_heads * head_dim, 16, 4096
    widths = num_q_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim
    keys, values = paged_kv.empty(8, num_kv_heads, page, head_dim, dtype, CPU)
    for num_tokens, num_seqs in ((4, 4), (512, 3)):
        x, residual = torch.empty(2, num_tokens, hidden, dtype=dtype)
        weights, which = torch.empty(3, hidden, dtype=dtype), torch.zeros(num_tokens, dtype=torch.int32)
        for chosen in (None, which):
            rms_norm(x, weights, 1e-5, which_T=chosen)
            fused_add_rms_norm_(x, residual, weights, 1e-5, chosen)
        silu_mul(torch.empty(num_tokens, 2 * inner, dtype=dtype))
        qkv = torch.empty(num_tokens, sum(widths), dtype=dtype)
        positions = torch.zeros(num_tokens, dtype=torch.int64)
        head_norm = torch.empty(1, head_dim, dtype=dtype)
        for norm in (None, head_norm):
            cos_sin = torch.empty(64, head_dim)
            rope_kv_write_(
                qkv, cos_sin, positions, keys, values, positions, num_q_heads, num_kv_heads, norm, norm, 1e-5, None
            )
        table = torch.zeros(num_seqs, 4, dtype=torch.int32)
        starts = torch.arange(num_seqs + 1, dtype=torch.int32)
        contexts = torch.ones(num_seqs, dtype=torch.int32)
        for window in (0, 100):
            paged_attention(qkv[:, : widths[0]], keys, values, table, starts, contexts, num_q_heads, 0.1, window)
        slots = LoraSlots(
            torch.empty(2, 3, 64, hidden, dtype=dtype),
            torch.empty(2, 64, sum(widths), dtype=dtype),
            torch.zeros(2, 3, dtype=torch.int32),
            torch.zeros(2, 3),
            torch.zeros(2, 3, dtype=torch.int32),
            torch.zeros(2, sum(widths)),
            torch.zeros(2, sum(widths)),
            torch.tensor(widths, dtype=torch.int32).cumsum(0, dtype=torch.int32),
            is_aligned=True,
        )
        one = torch.ones(1, dtype=torch.int32)
        lora_add_(qkv, x, slots, LoraSegments(0 * one, num_tokens * one, 0 * one, torch.ones(1)))
    columns = torch.zeros(4), torch.zeros(4, dtype=torch.int64), torch.ones(4), torch.zeros(4), torch.zeros(4).double()
    sample_tokens(torch.empty(4, vocab_size, dtype=dtype), *columns)


def resources(kernel: Any) -> dict[str, int]:
    """Return the resources that ptxas gave a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout))
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": kernel.metadata.shared,
    }


# Llama-3-8B's heads, Llama-2-7B's, a small model's, and the largest heads supported.
SHAPES = ((32, 8, 128), (32, 32, 128), (9, 3, 64), (8, 1, 512))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for a GPU that is not here.")
    parser.add_argument("--capability", type=int, default=90, help="80: A100, 90: H100 and H200 (default)")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set; unset it.")
    with compiling(args.capability) as kernels, forced("triton"):
        for dtype in (getattr(torch, name) for name in args.dtypes):
            for num_q_heads, num_kv_heads, head_dim in SHAPES:
                known = len(kernels)
                call_everything(dtype, num_q_heads, num_kv_heads, head_dim)
                for name, kernel in kernels[known:]:
                    shape = {"dtype": str(dtype), "heads": [num_q_heads, num_kv_heads, head_dim]}
                    print(json.dumps({"kernel": name, **shape, **resources(kernel)}), flush=True)


if __name__ == "__main__":
    main()
