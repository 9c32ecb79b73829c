"""Layout of keys and values in a page: the order in which attention multiplies them, so that it never rearranges them.

On a GPU both are plain, with a token's features adjacent:

    keys, values [pages, kv heads, page size, D]

On a CPU a product takes a unit of several elements at once: two for bfloat16, one otherwise. Within a page and head, a
key is split into units of features, and the tokens of the page are adjacent per unit; values are grouped in units of
tokens, with the features adjacent. With u elements per unit:

    keys   [pages, kv heads, D / u, page size, u]
    values [pages, kv heads, page size / u, D, u]

A token's flat place, the kernels' slot, is page · page size + offset.
"""

from __future__ import annotations

import torch

from lorafleet.kernels.dispatch import uses_triton


def empty(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_layers: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate keys and values in this device's layout; with num_layers, with a leading dimension of layers."""
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    if uses_triton(device):
        key_shape = value_shape = (num_pages, num_kv_heads, page_size, head_dim)
    else:
        u = 2 if dtype == torch.bfloat16 else 1
        key_shape = (num_pages, num_kv_heads, head_dim // u, page_size, u)
        value_shape = (num_pages, num_kv_heads, page_size // u, head_dim, u)
    layers = () if num_layers is None else (num_layers,)
    # Not zeros: on a CPU untouched pages then cost no physical memory.
    return (
        torch.empty((*layers, *key_shape), dtype=dtype, device=device),
        torch.empty((*layers, *value_shape), dtype=dtype, device=device),
    )


def is_plain(k_cache: torch.Tensor) -> bool:
    return k_cache.dim() == 4


def sizes(k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[int, int, int]:
    """Return (kv heads, page size, head dim) of one layer's pages."""
    return k_cache.shape[1], k_cache.shape[2 if is_plain(k_cache) else 3], v_cache.shape[3]


def write_(
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots_T: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Write k and v, [T, kv heads, D], to the places in `slots_T`."""
    _, page_size, _ = sizes(k_cache, v_cache)
    page, offset = slots_T // page_size, slots_T % page_size
    if is_plain(k_cache):
        k_cache[page, :, offset], v_cache[page, :, offset] = k, v
        return
    u = k_cache.shape[4]
    k_cache[page, :, :, offset] = k.unflatten(2, (-1, u))
    v_cache[page, :, offset // u, :, offset % u] = v


def read(k_cache: torch.Tensor, v_cache: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of all tokens of some pages, [kv heads, tokens, D] each."""
    if is_plain(k_cache):
        return k_cache[pages].transpose(0, 1).flatten(1, 2), v_cache[pages].transpose(0, 1).flatten(1, 2)
    keys = k_cache[pages].permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
    values = v_cache[pages].permute(1, 0, 2, 4, 3).flatten(1, 3)
    return keys, values
