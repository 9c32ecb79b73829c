"""Attention over pages against its reference, in every version."""

from __future__ import annotations

import pytest
import torch
from attention_case import attention_case
from kernel_checks import close, dtypes

from lorafleet.kernels.attention import paged_attention
from lorafleet.kernels.dispatch import forced, uses_triton

pytestmark = pytest.mark.usefixtures("each_version")


def check(
    lengths: list[tuple[int, int]], shape: tuple[int, int, int, int], dtype: torch.dtype, window: int = 0
) -> None:
    """shape: query heads, key-value heads, head dim, page size."""
    q_heads, _, dim, _ = shape
    arguments = attention_case(lengths, *shape, dtype)
    with forced(None):
        expected = paged_attention(*arguments, q_heads, dim**-0.5, window)
    ours = paged_attention(*arguments, q_heads, dim**-0.5, window)
    assert not expected.isnan().any(), "the case itself must be clean"
    close(ours, expected)


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
    if uses_triton(torch.device("cpu")):
        lengths = [(1, 1), (37, 37), (5, 70), (40, 130), (1, 200)]  # its interpreter is slow
    check(lengths, (q_heads, kv_heads, dim, page), dtype, window)


@pytest.mark.parametrize(
    ("shape", "window", "dtype"),
    [
        ((3, 3, 32, 16), 0, torch.float32),
        ((6, 2, 64, 8), 0, torch.bfloat16),
        ((8, 1, 128, 128), 0, torch.float16),
        ((6, 2, 64, 8), 7, torch.float32),
        ((3, 3, 32, 16), 300, torch.bfloat16),
        ((8, 1, 128, 128), 300, torch.float32),
    ],
    ids=str,
)
def test_decode_steps(shape: tuple[int, int, int, int], window: int, dtype: torch.dtype) -> None:
    """One query each: the shortest context, lengths around page and block boundaries, and one of many parts."""
    contexts = [1, 7, 8, 9, 33, 1000, 63, 64, 65, 256, 257, 1]
    check([(1, context) for context in contexts], shape, dtype, window)


@pytest.mark.parametrize("shape", [(3, 3, 32, 16), (6, 2, 64, 8), (8, 1, 128, 32)], ids=str)
def test_whole_prompts(shape: tuple[int, int, int, int]) -> None:
    check([(1, 1), (130, 130), (16, 16), (2, 2), (43, 43)], shape, torch.float16)


@pytest.mark.parametrize(
    ("queries", "context", "window"),
    [(1, 1, 0), (1, 129, 0), (1, 1500, 0), (1, 1500, 600), (2, 2, 0), (100, 100, 0), (70, 300, 0), (70, 300, 50)],
)
def test_one_sequence(queries: int, context: int, window: int) -> None:
    check([(queries, context)], (4, 2, 64, 16), torch.bfloat16, window)


@pytest.mark.parametrize("num_queries", [1, 2])
def test_many_sequences(num_queries: int) -> None:
    """More sequences than the Triton kernels process at once in their search for one."""
    lengths = [(1, 1 + s % 20) for s in range(135)]
    lengths[130] = (num_queries, 200)
    check(lengths, (1, 1, 16, 8), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40, 1, 72, 16), (3, 1, 256, 8), (2, 2, 512, 16)], ids=str)
@pytest.mark.parametrize("queries", [1, 9])
def test_many_query_heads_and_wide_heads(queries: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check([(queries, 90), (1, 30)], shape, dtype)


def test_attention_keeps_nan_within_its_sequence() -> None:
    q, keys, values, table, starts, contexts = attention_case([(4, 40), (1, 50), (20, 20)], 4, 2, 16, 8, torch.float32)
    clean = paged_attention(q, keys, values, table, starts, contexts, 4, 0.25)
    keys[table[1, 0]] = torch.nan
    spoilt = paged_attention(q, keys, values, table, starts, contexts, 4, 0.25)
    assert spoilt[4].isnan().all()
    assert torch.equal(spoilt[:4], clean[:4]) and torch.equal(spoilt[5:], clean[5:])
