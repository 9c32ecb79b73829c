"""The memory behind the pages: one pair of tensors per layer. Which page is whose, engine/block_pool.py knows."""

from __future__ import annotations

import torch

from lorafleet.kernels import paged_kv


class KVCache:
    """Keys and values of all layers, each layer's as kernels/paged_kv.py lays out.

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
        self.keys, self.values = paged_kv.empty(
            num_pages, num_kv_heads, page_size, head_dim, dtype, device, num_layers=num_layers
        )
        self.page_size = page_size
