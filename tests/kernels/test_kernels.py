"""Every native kernel against its reference: dtypes, odd sizes, segment layouts, and NaN that must stay where it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.kernels.activation import silu_mul
from lorafleet.kernels.attention import paged_attention
from lorafleet.kernels.build import Level, supported_levels
from lorafleet.kernels.linear import gather_rows, linear, linear_reference, prepare, quantize_int8
from lorafleet.kernels.lora import LoraSegments, LoraSlots, lora_add_
from lorafleet.kernels.native import forced, library
from lorafleet.kernels.norm import fused_add_rms_norm_, rms_norm
from lorafleet.kernels.paged_kv import key_shape, read, value_shape, write_
from lorafleet.kernels.rope import rope_kv_write_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (absolute, relative); the 16-bit ones allow one rounding more or less than the reference has.
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (3e-3, 3e-3)}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    atol, rtol = TOLERANCE[expected.dtype]
    torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol, equal_nan=True)


@pytest.fixture(params=supported_levels(), ids=lambda level: level.name, autouse=True, scope="module")
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here runs once for each instruction set that this machine has."""
    level: Level = request.param
    with forced(level):
        assert library() is not None
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@dtypes
@pytest.mark.parametrize("size", [1, 16, 48, 577])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_norms(dtype: torch.dtype, rows: int, size: int) -> None:
    x, residual = torch.randn(rows, size).to(dtype), torch.randn(rows, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    with forced(None):
        expected = rms_norm(x, weight, 1e-5)
        expected_x, expected_residual = x.clone(), residual.clone()
        fused_add_rms_norm_(expected_x, expected_residual, weight, 1e-5)
    close(rms_norm(x, weight, 1e-5), expected)
    fused_add_rms_norm_(x, residual, weight, 1e-5)
    close(x, expected_x)
    close(residual, expected_residual)


@dtypes
@pytest.mark.parametrize("rows", [1, 33])
def test_norms_with_a_weight_of_each_rows_own(dtype: torch.dtype, rows: int) -> None:
    x, residual = torch.randn(rows, 49).to(dtype), torch.randn(rows, 49).to(dtype)
    weights = torch.randn(5, 49).to(dtype)
    which = torch.randint(0, 5, (rows,), dtype=torch.int32)
    ours = rms_norm(x, weights, 1e-5, which_T=which)
    ours_x, ours_residual = x.clone(), residual.clone()
    fused_add_rms_norm_(ours_x, ours_residual, weights, 1e-5, which)
    with forced(None):
        close(ours, rms_norm(x, weights, 1e-5, which_T=which))
        fused_add_rms_norm_(x, residual, weights, 1e-5, which)
    close(ours_x, x)
    close(ours_residual, residual)
    assert torch.equal(rms_norm(x, weights, 1e-5), rms_norm(x, weights[0].contiguous(), 1e-5)), "without, the first"


@dtypes
@pytest.mark.parametrize("size", [1, 80, 1537])
def test_silu_mul(dtype: torch.dtype, size: int) -> None:
    x = (torch.randn(9, 2 * size) * 4).to(dtype)
    with forced(None):
        expected = silu_mul(x)
    close(silu_mul(x), expected)


@dtypes
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(4, 4, 16), (9, 3, 64), (8, 1, 32), (2, 2, 128)])
@pytest.mark.parametrize("num_norms", [0, 1, 4])
def test_rope_and_kv_write(dtype: torch.dtype, q_heads: int, kv_heads: int, dim: int, num_norms: int) -> None:
    """Without norms, with one of q and k each, or with one of each row's own."""
    rows, pages, page = 21, 7, 8
    qkv = torch.randn(rows, (q_heads + 2 * kv_heads) * dim).to(dtype)
    angles = torch.rand(100, dim // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.randint(0, 100, (rows,))
    slots = torch.randperm(pages * page)[:rows]
    norms = tuple(torch.randn(2, num_norms, dim).to(dtype)) if num_norms else (None, None)
    which = torch.randint(0, num_norms, (rows,), dtype=torch.int32) if num_norms > 1 else None

    def run() -> tuple[torch.Tensor, ...]:
        own, (keys, values) = qkv.clone(), empty_pages(pages, kv_heads, page, dim, dtype)
        rope_kv_write_(own, cos_sin, positions, keys, values, slots, q_heads, kv_heads, *norms, 1e-6, which)
        return own, keys, values

    with forced(None):
        expected = run()
    for ours, wanted in zip(run(), expected, strict=True):
        close(ours, wanted)


def empty_pages(
    num_pages: int, kv_heads: int, page: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of pages in which nothing has been written: all NaN."""
    sizes = (num_pages, kv_heads, page, dim, dtype)
    return (
        torch.full(key_shape(*sizes), torch.nan, dtype=dtype),
        torch.full(value_shape(*sizes), torch.nan, dtype=dtype),
    )


@dtypes
def test_pages_give_back_what_was_written(dtype: torch.dtype) -> None:
    keys, values = empty_pages(5, 3, 8, 6, dtype)
    k, v = torch.randn(2, 16, 3, 6).to(dtype)
    pages = torch.tensor([4, 1])
    slots = torch.cat([torch.arange(32, 40), torch.arange(8, 16)])
    write_(keys, values, slots.flip(0), k.flip(0), v.flip(0))
    read_keys, read_values = read(keys, values, pages)
    assert torch.equal(read_keys, k.transpose(0, 1)) and torch.equal(read_values, v.transpose(0, 1))
    assert keys[[0, 2, 3]].isnan().all() and values[[0, 2, 3]].isnan().all()


def attention_case(
    lengths: list[tuple[int, int]], q_heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """lengths: (queries, context) of each sequence. Pages are scattered; what no sequence owns is NaN."""
    needed = [-(-context // page) for _, context in lengths]
    total = sum(needed) + 3
    order = torch.randperm(total).tolist()
    keys, values = empty_pages(total, kv_heads, page, dim, dtype)
    table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for s, (_, context) in enumerate(lengths):
        for p in range(needed[s]):
            number = order.pop()
            table[s, p] = number
            filled = min(page, context - p * page)
            slots = torch.arange(number * page, number * page + filled)
            write_(keys, values, slots, *torch.randn(2, filled, kv_heads, dim).to(dtype))
    num_rows = sum(queries for queries, _ in lengths)
    fused = torch.randn(num_rows, (q_heads + 2 * kv_heads) * dim).to(dtype)
    starts = torch.tensor([0, *(queries for queries, _ in lengths)]).cumsum(0).to(torch.int32)
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    return fused[:, : q_heads * dim], keys, values, table, starts, contexts


@dtypes
@pytest.mark.parametrize("window", [0, 10, 100])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim", "page"),
    [(9, 3, 64, 16), (4, 4, 16, 8), (9, 1, 32, 16), (2, 1, 128, 32), (3, 3, 40, 8)],
)
def test_attention_over_decodes_prefills_and_chunks(
    q_heads: int, kv_heads: int, dim: int, page: int, window: int, dtype: torch.dtype
) -> None:
    lengths = [(1, 1), (1, 160), (37, 37), (5, 70), (64, 200), (1, 65), (33, 33), (1, 700)]
    arguments = attention_case(lengths, q_heads, kv_heads, dim, page, dtype)
    with forced(None):
        expected = paged_attention(*arguments, q_heads, dim**-0.5, window)
    ours = paged_attention(*arguments, q_heads, dim**-0.5, window)
    assert not expected.isnan().any(), "the case itself must be clean"
    close(ours, expected)


def test_attention_keeps_nan_within_its_sequence() -> None:
    q, keys, values, table, starts, contexts = attention_case([(4, 40), (1, 50), (20, 20)], 4, 2, 16, 8, torch.float32)
    clean = paged_attention(q, keys, values, table, starts, contexts, 4, 0.25)
    keys[table[1, 0]] = torch.nan
    spoilt = paged_attention(q, keys, values, table, starts, contexts, 4, 0.25)
    assert spoilt[4].isnan().all()
    assert torch.equal(spoilt[:4], clean[:4]) and torch.equal(spoilt[5:], clean[5:])


@dtypes
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 48), (576, 960), (50, 33), (2, 5), (30, 131)])
@pytest.mark.parametrize("rows", [0, 1, 3, 7, 33])
@pytest.mark.parametrize("form", ["plain", "packed", "int8", "packed int8"])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(rows: int, num_in: int, num_out: int, form: str, biased: bool, dtype: torch.dtype) -> None:
    packed = "packed" in form
    weight = prepare((torch.randn(num_out, num_in) / num_in**0.5).to(dtype), int8="int8" in form, packed=packed)
    assert (weight.num_in, weight.num_out, weight.is_packed) == (num_in, num_out, packed)
    bias = torch.randn(num_out).to(dtype) if biased else None
    x = torch.randn(rows, num_in + 6).to(dtype)[:, :num_in]
    with forced(None):
        expected = linear(x, weight, bias)
    close(linear(x, weight, bias), expected)


def test_an_odd_number_of_inputs_is_never_packed() -> None:
    weight = prepare(torch.randn(5, 33).bfloat16())
    assert not weight.is_packed
    x = torch.randn(3, 33).bfloat16()
    close(linear(x, weight), linear_reference(x, weight))


def test_packed_weights_are_the_weights() -> None:
    weight = torch.randn(131, 30).bfloat16()
    ids = torch.tensor([0, 130, 17, 17, 15, 16])
    for packed in (False, True):
        prepared = prepare(weight, packed=packed)
        assert torch.equal(gather_rows(prepared, ids), weight[ids])
        close(linear_reference(torch.eye(30).bfloat16(), prepared), weight.T)


def test_nan_in_a_row_of_x_stays_in_its_row_of_y() -> None:
    weight = prepare(torch.randn(40, 64).bfloat16(), packed=True)
    x = torch.randn(9, 64).bfloat16()
    clean = linear(x, weight)
    x[4, 3] = torch.nan
    spoilt = linear(x, weight)
    assert spoilt[4].isnan().all()
    rows = [row for row in range(9) if row != 4]
    assert torch.equal(spoilt[rows], clean[rows])


def test_int8_rounds_to_the_nearest_of_255_steps_per_output() -> None:
    weight = torch.randn(20, 64).bfloat16()
    weight[3] = 0.0
    integers, scale = quantize_int8(weight)
    assert integers.abs().amax(dim=1).tolist() == [127] * 3 + [0] + [127] * 16
    error = (integers.float() * scale[:, None] - weight.float()).abs()
    assert (error <= 0.51 * scale[:, None]).all()


class LoraCase:
    """Random slots of mixed ranks for a fused linear of three slices."""

    def __init__(
        self,
        rows: int,
        dtype: torch.dtype,
        lora_dtype: torch.dtype,
        *,
        num_in: int = 50,
        widths: tuple[int, ...] = (70, 16, 33),
    ) -> None:
        slots, max_rank = 6, 64
        self.x = torch.randn(rows, num_in).to(dtype)
        self.y = torch.randn(rows, sum(widths)).to(dtype)
        self.a = (torch.randn(slots, len(widths), max_rank, num_in) / num_in**0.5).to(lora_dtype)
        self.b = (torch.randn(slots, max_rank, sum(widths)) * 0.2).to(lora_dtype)
        self.rank = torch.tensor(
            [[8, 8, 8], [1, 3, 0], [64, 0, 16], [0, 0, 0], [5, 5, 5], [16, 1, 64]], dtype=torch.int32
        )
        self.scaling = torch.rand(slots, len(widths)) + 0.5
        self.ends = torch.tensor(widths, dtype=torch.int32).cumsum(0).to(torch.int32)
        # A slice with LoRA and one without, of slots that no composition uses.
        self.is_affine = torch.zeros(slots, len(widths), dtype=torch.int32)
        self.is_affine[3, 1:] = self.is_affine[4, ::2] = 1
        self.scale, self.shift = torch.rand(2, slots, sum(widths)) + 0.5

    def run(self, segments: list[tuple[int, int, int, float]]) -> torch.Tensor:
        """segments: (first row, behind the last, slot, weight)."""
        columns = list(zip(*segments, strict=True)) if segments else [(), (), (), ()]
        packed = LoraSegments(
            *(torch.tensor(column, dtype=torch.int32) for column in columns[:3]),
            torch.tensor(columns[3], dtype=torch.float32),
        )
        y = self.y.clone()
        changes = self.is_affine, self.scale, self.shift
        lora_add_(y, self.x, LoraSlots(self.a, self.b, self.rank, self.scaling, *changes, self.ends), packed)
        return y


LAYOUTS: dict[str, list[tuple[int, int, int, float]]] = {
    "distinct": [(i, i + 1, i % 6, 1.0) for i in range(40)],
    "uniform": [(i * 10, i * 10 + 10, i, 1.0) for i in range(4)],
    "zipf": [(0, 24, 2, 1.0), (24, 34, 0, 1.0), (34, 38, 1, 1.0), (38, 39, 4, 1.0), (39, 40, 5, 1.0)],
    "identical": [(0, 40, 0, 1.0)],
    "skewed": [(0, 1, 1, 1.0), (1, 40, 5, 1.0)],
    "empty ones between": [(0, 0, 0, 1.0), (3, 9, 2, 1.0), (9, 9, 1, 1.0), (20, 40, 3, 1.0)],
    "none": [],
    "base rows between": [(2, 5, 0, 1.0), (30, 31, 2, 1.0)],
    "composed": [(0, 20, 0, 0.7), (0, 20, 5, 0.3), (10, 30, 1, -1.0), (15, 40, 2, 0.5)],
}


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
