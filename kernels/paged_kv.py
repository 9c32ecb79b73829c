"""How keys and values lie in a page: in the order in which attention multiplies them, so that it never rearranges them.

A product takes a unit of several elements at once: two for bfloat16, one else. Keys of one page and head are kept with
their units apart, the tokens of the page side by side; values with their features side by side, a unit of tokens
together. With u elements to a unit:

    keys   [pages, kv heads, D / u, page size, u]
    values [pages, kv heads, page size / u, D, u]

A flat place of a token, the kernels' slot, is page · page size + offset.
"""

from __future__ import annotations

import torch


def unit(dtype: torch.dtype) -> int:
    """Elements that are multiplied together."""
    return 2 if dtype == torch.bfloat16 else 1


def key_shape(num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    u = unit(dtype)
    return num_pages, num_kv_heads, head_dim // u, page_size, u


def value_shape(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[int, ...]:
    u = unit(dtype)
    return num_pages, num_kv_heads, page_size // u, head_dim, u


def write_(
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots_T: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Put k and v, [T, kv heads, D], where `slots_T` says."""
    page_size, u = k_cache.shape[3], k_cache.shape[4]
    page, offset = slots_T // page_size, slots_T % page_size
    k_cache[page, :, :, offset] = k.unflatten(2, (-1, u))
    v_cache[page, :, offset // u, :, offset % u] = v


def read(k_cache: torch.Tensor, v_cache: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all tokens of some pages, [kv heads, tokens, D] each."""
    keys = k_cache[pages].permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
    values = v_cache[pages].permute(1, 0, 2, 4, 3).flatten(1, 3)
    return keys, values
