"""Batches with adapters, for the tests of the LoRA kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorafleet.kernels.lora import LoraSegments, LoraSlots, lora_add_


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
        device: str = "cpu",
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
        for name, tensor in vars(self).items():
            setattr(self, name, tensor.to(device))
        self.is_aligned = all(width % 16 == 0 for width in widths)

    def run(self, segments: list[tuple[int, int, int, float]]) -> torch.Tensor:
        """segments: (first row, after the last, slot, weight)."""
        starts, ends, slots, weights = zip(*segments, strict=True) if segments else ((), (), (), ())

        def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.y.device)

        packed = LoraSegments(
            column(starts, torch.int32),
            column(ends, torch.int32),
            column(slots, torch.int32),
            column(weights, torch.float32),
        )
        y = self.y.clone()
        changes = self.is_affine, self.scale, self.shift
        lora_add_(
            y, self.x, LoraSlots(self.a, self.b, self.rank, self.scaling, *changes, self.ends, self.is_aligned), packed
        )
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
