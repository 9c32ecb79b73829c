"""Division of LoRA's work over a batch for the GPU: tiles of rows, with one piece per adapter of a tile's rows.

The rows of one adapter are cut into tiles. With composed adapters, rows are in several segments; a tile then lies
within all segments it touches and has a piece for each. So one program sums everything added to its outputs, in a fixed
order, and rounds once.

B tiles, P pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

SMALL_ROWS = 16  # per tile: the tensor cores' minimum, for steps with few rows per adapter
LARGE_ROWS = 64
_MAX_SMALL_TOKENS = 256


@dataclass(frozen=True, slots=True)
class LoraTiles:
    """Tiles on the batch's device, all int32 except the weights."""

    start_B: torch.Tensor  # first row
    end_B: torch.Tensor  # end row (exclusive); a tile without rows is skipped
    first_B1: torch.Tensor  # a tile's pieces are [b] to [b + 1]
    tile_P: torch.Tensor
    slot_P: torch.Tensor
    weight_P: torch.Tensor  # float32
    block_rows: int  # maximum rows of a tile


@dataclass(frozen=True, slots=True)
class TileLists:
    """Tiles on the host."""

    starts: list[int]
    ends: list[int]
    firsts: list[int]
    tiles: list[int]
    slots: list[int]
    weights: list[float]
    block_rows: int

    def packed(self, num_tiles: int | None = None, num_pieces: int | None = None) -> torch.Tensor:
        """Pack everything into one int32 tensor, padded with empty tiles to these numbers of tiles and pieces."""
        num_tiles = len(self.starts) if num_tiles is None else num_tiles
        num_pieces = len(self.tiles) if num_pieces is None else num_pieces
        more_tiles, more_pieces = num_tiles - len(self.starts), num_pieces - len(self.tiles)
        assert more_pieces >= 0 and (more_tiles > 0 or more_pieces == more_tiles == 0)
        numbers = [
            *(*self.starts, *(0,) * more_tiles),
            *(*self.ends, *(0,) * more_tiles),
            *(*self.firsts, *(len(self.tiles),) * more_tiles),
            *(*self.tiles, *(num_tiles - 1,) * more_pieces),
            *(*self.slots, *(0,) * more_pieces),
        ]
        weights = torch.tensor([*self.weights, *(0.0,) * more_pieces], dtype=torch.float32)
        return torch.cat([torch.tensor(numbers, dtype=torch.int32), weights.view(torch.int32)])

    def on(self, packed: torch.Tensor, num_tiles: int | None = None, num_pieces: int | None = None) -> LoraTiles:
        """Return the tiles as views of `packed`'s result, on its device."""
        num_tiles = len(self.starts) if num_tiles is None else num_tiles
        num_pieces = len(self.tiles) if num_pieces is None else num_pieces
        sizes = [num_tiles, num_tiles, num_tiles + 1, num_pieces, num_pieces, num_pieces]
        start_B, end_B, first_B1, tile_P, slot_P, weight_P = packed.split(sizes)
        weight_P = weight_P.view(torch.float32)
        return LoraTiles(start_B, end_B, first_B1, tile_P, slot_P, weight_P, self.block_rows)


def block_rows_for(num_tokens: int) -> int:
    """Return the rows per tile in a step of `num_tokens`."""
    return SMALL_ROWS if num_tokens <= _MAX_SMALL_TOKENS else LARGE_ROWS


def divide(
    starts: Sequence[int], ends: Sequence[int], slots: Sequence[int], weights: Sequence[float], block_rows: int
) -> TileLists:
    """Divide segments, in any order and overlapping in any way, into tiles. Empty segments give none."""
    lists = TileLists([], [], [], [], [], [], block_rows)
    coming = sorted(range(len(starts)), key=starts.__getitem__, reverse=True)
    open_segments: list[int] = []
    for begin, end in pairwise(sorted({*starts, *ends})):
        open_segments = [g for g in open_segments if ends[g] > begin]
        while coming and starts[coming[-1]] == begin:
            g = coming.pop()
            if ends[g] > begin:
                open_segments.append(g)
        if not open_segments:
            continue
        for row in range(begin, end, block_rows):
            lists.firsts.append(len(lists.tiles))
            for g in open_segments:
                lists.tiles.append(len(lists.starts))
                lists.slots.append(slots[g])
                lists.weights.append(weights[g])
            lists.starts.append(row)
            lists.ends.append(min(end, row + block_rows))
    lists.firsts.append(len(lists.tiles))
    return lists
