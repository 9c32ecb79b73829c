"""Compares each CPU kernel with torch, or with its bound, at the sizes of a model's layers.

    python -m benchmarks.kernels [--model DIR] [--num-threads N]

Weights are read from many copies in turn, so that no cache holds them, as in a model of many layers.
LORAFLEET_CPU_LEVEL chooses a lower instruction set.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F

from lorafleet.kernels import native, paged_kv
from lorafleet.kernels.attention import paged_attention
from lorafleet.kernels.linear import linear, prepare
from lorafleet.kernels.lora import LoraSegments, LoraSlots, lora_add_
from lorafleet.workers.model.architecture import ModelSpec, read_model_spec

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_NUM_COPIES = 12
_PAGE = 16
_Weight = TypeVar("_Weight")


def median_us(function: Callable[[], object], repeat: int = 30) -> float:
    function()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def fused_linears(spec: ModelSpec) -> list[tuple[int, int]]:
    """Return (in, out) features of a layer's four products."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    return [(hidden, spec.qkv_size), (spec.q_size, hidden), (hidden, 2 * inner), (inner, hidden)]


def _each_in_turn(
    product: Callable[[torch.Tensor, _Weight], torch.Tensor], x: torch.Tensor, weights: Sequence[_Weight]
) -> Callable[[], object]:
    """x times the next weight at each call, so that no weight is in a cache."""
    turns = itertools.cycle(weights)
    return lambda: product(x, next(turns))


def linears(spec: ModelSpec) -> None:
    columns = ("packed", "int8", "plain", "torch", "torch/packed", "TFLOP/s")
    print(f"{'linears of a layer, µs':<24}" + "".join(f"{column:>14}" for column in columns))
    for rows in _ROWS:
        totals = [0.0] * 4
        flop = 0
        for num_in, num_out in fused_linears(spec):
            x = torch.randn(rows, num_in).bfloat16()
            weights = [torch.randn(num_out, num_in).bfloat16() for _ in range(_NUM_COPIES)]
            forms = ({"packed": True}, {"packed": True, "int8": True}, {"packed": False})
            for place, form in enumerate(forms):
                totals[place] += median_us(_each_in_turn(linear, x, [prepare(weight, **form) for weight in weights]))
            totals[3] += median_us(_each_in_turn(F.linear, x, weights))
            flop += 2 * rows * num_in * num_out
        packed, int8, plain_us, torch_us = totals
        # The plain kernel is for few rows; for more, `linear` is torch's product.
        figures = [f"{packed:.0f}", f"{int8:.0f}", f"{plain_us:.0f}" if rows <= 4 else "", f"{torch_us:.0f}"]
        figures += [f"{torch_us / packed:.2f}", f"{flop / packed / 1e6:.3f}"]
        print(f"{rows:>4} rows{'':<15}" + "".join(f"{figure:>14}" for figure in figures))


def attention(spec: ModelSpec) -> None:
    print(f"\n{'attention of a layer, µs':<36}{'µs':>9}{'GB/s':>9}{'TFLOP/s':>9}")
    for name, num_seqs, queries, context in (
        ("decode, 1 x 1,024 keys", 1, 1, 1024),
        ("decode, 32 x 192 keys", 32, 1, 192),
        ("prefill, 4 x 128", 4, 128, 128),
        ("prefill, 512 of 1,500", 1, 512, 1500),
    ):
        pages_each = -(-context // _PAGE)
        num_pages = num_seqs * pages_each
        sizes = (num_pages, spec.num_kv_heads, _PAGE, spec.head_dim, torch.bfloat16, torch.device("cpu"))
        keys, values = paged_kv.empty(*sizes, num_layers=_NUM_COPIES)
        keys.normal_(), values.normal_()
        table = torch.randperm(num_pages).to(torch.int32).view(num_seqs, pages_each)
        starts = torch.arange(num_seqs + 1, dtype=torch.int32) * queries
        contexts = torch.full((num_seqs,), context, dtype=torch.int32)
        q = torch.randn(num_seqs * queries, spec.q_size).bfloat16()
        turns = itertools.cycle(range(_NUM_COPIES))

        def run() -> None:
            copy = next(turns)  # noqa: B023
            paged_attention(q, keys[copy], values[copy], table, starts, contexts, spec.num_heads, 0.125)  # noqa: B023

        us = median_us(run)
        num_bytes = 2 * num_seqs * context * spec.kv_size * 2
        pairs = num_seqs * sum(range(context - queries + 1, context + 1))
        flop = 4 * pairs * spec.q_size
        print(f"{name:<36}{us:>9.0f}{num_bytes / us / 1e3:>9.1f}{flop / us / 1e6:>9.3f}")


def lora(spec: ModelSpec, lora_rank: int = 8) -> None:
    print(f"\n{f'LoRA of a layer, rank {lora_rank}':<36}{'µs':>9}{'GB/s':>9}")
    for name, rows, count in (
        ("1 row", 1, 1),
        ("32 rows, 1 adapter", 32, 1),
        ("32 rows, 4 adapters", 32, 4),
        ("32 rows, 16 adapters", 32, 16),
        ("512 rows, 4 adapters", 512, 4),
    ):
        total, num_bytes = 0.0, 0
        hidden, inner = spec.hidden_size, spec.intermediate_size
        for num_in, widths in (
            (hidden, (spec.q_size, spec.kv_size, spec.kv_size)),
            (spec.q_size, (hidden,)),
            (hidden, (inner, inner)),
            (inner, (hidden,)),
        ):
            num_out, num_slices = sum(widths), len(widths)
            copies = [
                (
                    torch.randn(16, num_slices, lora_rank, num_in).bfloat16(),
                    torch.randn(16, lora_rank, num_out).bfloat16(),
                )
                for _ in range(_NUM_COPIES)
            ]
            rank = torch.full((16, num_slices), lora_rank, dtype=torch.int32)
            scaling, plain = torch.ones(16, num_slices), torch.zeros(16, num_slices, dtype=torch.int32)
            scale, shift = torch.ones(2, 16, num_out)
            ends = torch.tensor(widths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            bounds = torch.tensor([rows * i // count for i in range(count + 1)], dtype=torch.int32)
            slots = torch.randperm(16)[:count].to(torch.int32)
            segments = LoraSegments(bounds[:-1].clone(), bounds[1:].clone(), slots, torch.ones(count))
            x, y = torch.randn(rows, num_in).bfloat16(), torch.randn(rows, num_out).bfloat16()
            turns = itertools.cycle(copies)

            def run() -> None:
                a, b = next(turns)  # noqa: B023
                lora_add_(y, x, LoraSlots(a, b, rank, scaling, plain, scale, shift, ends), segments)  # noqa: B023

            total += median_us(run)
            num_bytes += 2 * count * lora_rank * (num_slices * num_in + num_out)
        print(f"{name:<36}{total:>9.0f}{num_bytes / total / 1e3:>9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the CPU kernels.")
    parser.add_argument("--model", type=Path, help="model directory (default: the demo model)")
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    native.set_threads(args.num_threads)
    from benchmarks.compare import demo_model

    spec = read_model_spec(args.model or demo_model())
    with torch.inference_mode():
        linears(spec)
        attention(spec)
        lora(spec)


if __name__ == "__main__":
    main()
