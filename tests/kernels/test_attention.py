"""Attention over pages against its reference, in every version."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import close, dtypes, empty_pages

from lorafleet.kernels.attention import paged_attention
from lorafleet.kernels.dispatch import forced
from lorafleet.kernels.paged_kv import write_

pytestmark = pytest.mark.usefixtures("each_version")


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
