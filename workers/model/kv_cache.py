"""The memory of KV pages: one pair of tensors per layer. scheduling/block_pool.py knows the owner of each page."""

from __future__ import annotations

import torch

from lorafleet.kernels import paged_kv


class KVCache:
    """Keys and values of all layers; kernels/paged_kv.py defines each layer's layout.

    The memory is not cleared: attention reads only values written for the request that holds the page.
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
