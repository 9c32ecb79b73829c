"""Sequences with queries and pages of keys and values, for the tests of attention."""

from __future__ import annotations

import torch
from kernel_checks import empty_pages

from lorafleet.kernels.paged_kv import write_


def attention_case(
    lengths: list[tuple[int, int]], q_heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """lengths: (queries, context) of each sequence. Pages are scattered; memory that no sequence owns is NaN.

    In the table, entries after a sequence's last page are no valid pages.
    """
    needed = [-(-context // page) for _, context in lengths]
    total = sum(needed) + 3
    order = torch.randperm(total).tolist()
    keys, values = empty_pages(total, kv_heads, page, dim, dtype)
    table = torch.full((len(lengths), max(needed)), 1 << 30, dtype=torch.int32)
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
