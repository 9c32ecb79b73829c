"""Segments as tiles and pieces, compared with the rows they came from."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.kernels.lora_tiles import LARGE_ROWS, SMALL_ROWS, block_rows_for, divide

Segments = list[tuple[int, int, int]]  # (first row, how many, slot)


def rows_of(segments: Segments) -> Counter[tuple[int, int]]:
    """Count each (row, slot)."""
    return Counter((row, slot) for start, length, slot in segments for row in range(start, start + length))


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40), st.integers(0, 5)), max_size=12))
def test_tiles_have_each_row_once_and_pieces_each_segments_rows(segments: Segments) -> None:
    columns = zip(*segments, strict=True) if segments else ((), (), ())
    starts, lengths, slots = (list(column) for column in columns)
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    weights = [float(number) for number in range(len(segments))]
    lists = divide(starts, ends, slots, weights, 16)
    tiles = list(zip(lists.starts, lists.ends, strict=True))
    assert all(0 < end - start <= 16 for start, end in tiles)
    covered = [row for start, end in tiles for row in range(start, end)]
    assert len(covered) == len(set(covered))
    assert lists.firsts[0] == 0 and lists.firsts[-1] == len(lists.tiles)
    found: Counter[tuple[int, int]] = Counter()
    for tile, (start, end) in enumerate(tiles):
        own = range(lists.firsts[tile], lists.firsts[tile + 1])
        assert own and all(lists.tiles[piece] == tile for piece in own)
        for piece in own:
            assert lists.slots[piece] == slots[int(lists.weights[piece])]
            found.update((row, lists.slots[piece]) for row in range(start, end))
    assert found == rows_of(segments)


def test_one_row_for_each_adapter_makes_no_more_tiles_than_rows() -> None:
    lists = divide(range(20), range(1, 21), [3] * 20, [1.0] * 20, 16)
    assert len(lists.starts) == len(lists.tiles) == 20


@pytest.mark.parametrize(("num_tokens", "rows"), [(1, SMALL_ROWS), (256, SMALL_ROWS), (257, LARGE_ROWS)])
def test_prompts_get_larger_tiles(num_tokens: int, rows: int) -> None:
    assert block_rows_for(num_tokens) == rows
