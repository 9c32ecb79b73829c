"""The memory behind the pages: one pair of tensors per layer. Which page is whose, engine/block_pool.py knows."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of all layers, [num_pages, KV heads, page size, head dim] each.

    A token's keys lie at [page, :, offset]; its flat place, the kernels' `slot mapping`, is page * page_size + offset.
    The memory is not cleared: attention reads only what was written for the request that holds the page.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
        # empty, not zeros: on a CPU untouched pages then cost no physical memory.
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.page_size = page_size
