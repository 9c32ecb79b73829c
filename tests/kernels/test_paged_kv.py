"""Places of keys and values in each layout."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import dtypes, empty_pages

from lorafleet.kernels.paged_kv import read, write_

pytestmark = pytest.mark.usefixtures("each_version")


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
