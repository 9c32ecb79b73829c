"""Many copies in one call against one by one, at every instruction set."""

from __future__ import annotations

import pytest
import torch

from lorafleet.kernels.copy import Copies, copy_reference
from lorafleet.kernels.dispatch import forced

pytestmark = pytest.mark.usefixtures("each_level")

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def make_pairs(places: torch.Tensor, numbers: torch.Tensor) -> Pairs:
    """Pieces of slots that are not contiguous, from sources that are not contiguous."""
    source = torch.arange(600, dtype=torch.float32).bfloat16().view(20, 30)
    return [
        (places[:, :4, :30], source[:4]),
        (places[:, 4:7, 5:15], source[6:9, 10:20]),
        (places[:, 7:8, :1], source[10:11, 3:4]),
        (places[:, 8, :7], source[12, :7]),
        (places[:, 9:9, :30], source[:0]),
        (numbers[:, 1:], torch.tensor([5, 6, 7], dtype=torch.int32)),
    ]


def test_all_at_once_and_in_pieces_as_one_by_one() -> None:
    results = []
    for max_bytes in (None, 1, 64, 300, 1 << 20):
        places = torch.zeros(3, 10, 32, dtype=torch.bfloat16)
        numbers = torch.zeros(3, 4, dtype=torch.int32)
        pairs = make_pairs(places, numbers)
        copies = Copies(pairs)
        if max_bytes is None:
            copy_reference(pairs, 2)
        else:
            begin = 0
            while begin < copies.num_copies:
                end = copies.end_of(begin, max_bytes)
                assert end > begin
                copies.run(2, begin, end)
                begin = end
        assert not places[:2].any() and not numbers[:2].any(), "other slots are left alone"
        results.append((places[2], numbers[2]))
    for places, numbers in results[1:]:
        assert torch.equal(places, results[0][0]) and torch.equal(numbers, results[0][1])
    assert results[0][0].any() and results[0][1].any()


def test_pieces_are_as_large_as_they_may_be() -> None:
    pairs = make_pairs(torch.zeros(3, 10, 32, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.int32))
    copies = Copies(pairs)
    sizes = [source.nbytes for _, source in pairs]
    assert copies.end_of(0, sizes[0]) == 1
    assert copies.end_of(0, sizes[0] + sizes[1]) == 2
    assert copies.end_of(1, sum(sizes)) == len(pairs)


def test_a_list_serves_every_storage_that_is_filled_alike() -> None:
    places, numbers = torch.zeros(3, 2, 4), torch.zeros(3, 2, dtype=torch.int32)
    first, second = torch.arange(16.0), torch.arange(100.0, 116.0)
    pairs = [(places, first[8:].view(2, 4)), (numbers, torch.tensor([5, 6], dtype=torch.int32))]
    copies = Copies(pairs, first.untyped_storage())
    for i, values in ((1, first), (2, second)):
        if copies.is_native or values is first:
            copies.run(i, storage=values.untyped_storage())
            assert torch.equal(places[i], values[8:].view(2, 4)) and numbers[i].tolist() == [5, 6]
    assert not places[0].any() and not numbers[0].any()


def test_without_kernels_the_reference_runs() -> None:
    places, numbers = torch.zeros(3, 10, 32, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.int32)
    with forced(None):
        copies = Copies(make_pairs(places, numbers))
        copies.run(1)
    assert not copies.is_native
    assert places[1].any() and not places[0].any()


def test_staged_bytes_stand_in_for_the_storage() -> None:
    places, numbers = torch.zeros(3, 2, 4), torch.zeros(3, 2, dtype=torch.int32)
    source = torch.arange(16.0)
    with forced(None):
        pairs = [(places, source[4:14].view(2, 5)[:, :4]), (numbers, torch.tensor([5, 6], dtype=torch.int32))]
        copies = Copies(pairs, source.untyped_storage())
        staged = torch.full((70,), 255, dtype=torch.uint8)  # longer than this adapter, and no whole number of elements
        staged[:64] = (source + 100).view(torch.uint8)
        copies.run_from(2, staged)
    assert places[2].tolist() == [[104, 105, 106, 107], [109, 110, 111, 112]] and numbers[2].tolist() == [5, 6]
    assert not places[:2].any() and not numbers[:2].any()


def test_what_does_not_fit_is_a_mistake_of_ours() -> None:
    places = torch.zeros(2, 3, 4)
    with pytest.raises(AssertionError):
        Copies([(places, torch.zeros(3, 5))])
    with pytest.raises(AssertionError):
        Copies([(places, torch.zeros(3, 4, dtype=torch.bfloat16))])
    with pytest.raises(AssertionError):
        Copies([(places, torch.zeros(4, 3).T)])
