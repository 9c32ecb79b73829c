"""The Triton LoRA kernels against the reference: in the interpreter, or on a GPU if present."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import close
from lora_case import LAYOUTS, LoraCase

from lorafleet.kernels.dispatch import forced

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(case: LoraCase, segments: list[tuple[int, int, int, float]]) -> torch.Tensor:
    with forced("triton"):
        ours = case.run(segments)
        with forced(None):
            expected = case.run(segments)
        close(ours, expected)
    return ours


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    case = LoraCase(40, F32, F32, device=DEVICE)
    ours = compare(case, LAYOUTS[layout])
    covered = {row for start, end, *_ in LAYOUTS[layout] for row in range(start, end)}
    base = [row for row in range(40) if row not in covered]
    assert torch.equal(ours[base], case.y[base]), "base rows are bit-identical"


@pytest.mark.parametrize(("dtype", "lora_dtype"), [(BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, BF16)])
def test_dtypes(dtype: torch.dtype, lora_dtype: torch.dtype) -> None:
    compare(LoraCase(40, dtype, lora_dtype, device=DEVICE), LAYOUTS["composed"])


@pytest.mark.parametrize("num_in", [1, 128, 600])
def test_inputs_are_split_over_programs(num_in: int) -> None:
    case = LoraCase(3, F32, F32, num_in=num_in, widths=(130, 1, 64), device=DEVICE)
    compare(case, [(0, 2, 1, 1.0), (2, 3, 5, 1.0)])


def test_slices_that_begin_at_multiples_of_sixteen() -> None:
    case = LoraCase(40, BF16, BF16, num_in=64, widths=(160, 48, 96), device=DEVICE)
    assert case.is_aligned
    compare(case, LAYOUTS["zipf"])


def test_large_tiles() -> None:
    """Enough rows for large tiles: an adapter with several tiles, one with a few rows, one composed with another."""
    case = LoraCase(300, F32, F32, device=DEVICE)
    compare(case, [(0, 3, 4, 1.0), (3, 170, 2, 1.0), (200, 290, 0, 0.5), (200, 290, 5, 2.0)])


def test_nan_weights_harm_only_rows_of_their_slot() -> None:
    case = LoraCase(40, F32, F32, device=DEVICE)
    segments = [(0, 10, 0, 1.0), (10, 11, 2, 1.0), (11, 30, 5, 1.0)]
    with forced("triton"):
        clean = case.run(segments)
        case.a[2] = case.b[2] = torch.nan
        case.a[0, :, 8:] = case.b[0, 8:] = torch.nan  # beyond the adapter's own rank
        spoilt = case.run(segments)
    rows = [row for row in range(40) if row != 10]
    assert torch.equal(spoilt[rows], clean[rows])
    assert spoilt[10].isnan().any()


def test_results_are_the_same_each_time() -> None:
    case = LoraCase(40, F32, F32, num_in=512, device=DEVICE)
    with forced("triton"):
        once = case.run([(0, 10, 0, 1.0), (12, 20, 5, 1.0)])
        again = case.run([(0, 10, 0, 1.0), (12, 20, 5, 1.0)])
    assert torch.equal(once, again)
