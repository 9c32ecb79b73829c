"""LoRA over segments against its reference and its formula, at every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, close, dtypes
from lora_case import LAYOUTS, LoraCase

from lorafleet.kernels.dispatch import forced

pytestmark = pytest.mark.usefixtures("each_level")


@dtypes
@pytest.mark.parametrize("lora_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_over_segments(layout: str, dtype: torch.dtype, lora_dtype: torch.dtype) -> None:
    case = LoraCase(40, dtype, lora_dtype)
    with forced(None):
        expected = case.run(LAYOUTS[layout])
    ours = case.run(LAYOUTS[layout])
    close(ours, expected)
    covered = {row for start, end, *_ in LAYOUTS[layout] for row in range(start, end)}
    base = [row for row in range(40) if row not in covered]
    assert torch.equal(ours[base], case.y[base]), "base rows are bit-identical"


def test_lora_equals_its_formula() -> None:
    case = LoraCase(40, torch.float32, torch.float32)
    expected = case.y.clone()
    begin = 0
    for n, end in enumerate(case.ends.tolist()):
        rank = int(case.rank[2, n])
        delta = case.x[3:9] @ case.a[2, n, :rank].T @ case.b[2, :rank, begin:end]
        expected[3:9, begin:end] += 0.5 * case.scaling[2, n] * delta
        begin = end
    close(case.run([(3, 9, 2, 0.5)]), expected)


def test_lora_with_a_scale_and_a_shift_equals_its_formula() -> None:
    case = LoraCase(40, torch.float32, torch.float32)
    expected = case.y.clone()
    q, k, v = slice(0, 70), slice(70, 86), slice(86, 119)
    delta = case.x[3:9] @ case.a[4, 0, :5].T @ case.b[4, :5, q]
    expected[3:9, q] = case.scale[4, q] * (expected[3:9, q] + case.scaling[4, 0] * delta) + case.shift[4, q]
    expected[3:9, k] += case.scaling[4, 1] * (case.x[3:9] @ case.a[4, 1, :5].T @ case.b[4, :5, k])
    delta = case.x[3:9] @ case.a[4, 2, :5].T @ case.b[4, :5, v]
    expected[3:9, v] = case.scale[4, v] * (expected[3:9, v] + case.scaling[4, 2] * delta) + case.shift[4, v]
    expected[20:21, 70:] = case.scale[3, 70:] * expected[20:21, 70:] + case.shift[3, 70:]  # no LoRA at all
    close(case.run([(3, 9, 4, 1.0), (20, 21, 3, 1.0)]), expected)


def test_nan_weights_harm_only_rows_of_their_slot() -> None:
    case = LoraCase(40, torch.float32, torch.float32)
    segments = [(0, 10, 0, 1.0), (10, 11, 2, 1.0), (11, 30, 5, 1.0)]
    clean = case.run(segments)
    case.a[2] = case.b[2] = torch.nan
    spoilt = case.run(segments)
    rows = [row for row in range(40) if row != 10]
    assert torch.equal(spoilt[rows], clean[rows])
    assert spoilt[10].isnan().any()


def test_values_behind_an_adapters_own_rank_do_not_count() -> None:
    case = LoraCase(4, torch.float32, torch.float32)
    clean = case.run([(0, 4, 0, 1.0)])
    case.a[0, :, 8:] = torch.nan
    case.b[0, 8:] = torch.nan
    assert torch.equal(case.run([(0, 4, 0, 1.0)]), clean)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=12),
    num_in=st.integers(1, 40),
    widths=st.tuples(st.integers(1, 80), st.integers(1, 20), st.integers(1, 70)),
)
def test_lora_over_any_layout(lengths: list[tuple[int, int]], num_in: int, widths: tuple[int, int, int]) -> None:
    rows = sum(length for length, _ in lengths)
    case = LoraCase(rows, torch.float32, torch.float32, num_in=num_in, widths=widths)
    segments, row = [], 0
    for length, slot in lengths:
        segments.append((row, row + length, slot, 1.0))
        row += length
    with forced(None):
        expected = case.run(segments)
    close(case.run(segments), expected)
