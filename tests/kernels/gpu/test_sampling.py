"""The Triton sampling kernel against the reference: in the interpreter, or on a GPU if present."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from kernel_checks import DTYPES
from sampling_checks import SHAPES, TEMPERATURES, agree, columns, distribution, drawn, grid, mixed_columns

from lorafleet.kernels.dispatch import forced
from lorafleet.kernels.sampling import sample_tokens

BLOCK = 4096  # tokens per chunk of the kernel


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with forced("triton"), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.mark.parametrize(
    ("rows", "vocab_size"), [(0, 7), (1, 1), (20, 2), (20, 577), (4, BLOCK), (4, BLOCK + 1), (3, 49_152)]
)
def test_rows_of_mixed_options(rows: int, vocab_size: int) -> None:
    logits = (torch.randn(rows, vocab_size + 3) * 3)[:, :vocab_size]
    before = logits.clone()
    agree(logits, *mixed_columns(rows, vocab_size))
    assert torch.equal(logits, before), "they are not to be changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_distributions(shape: str, dtype: torch.dtype) -> None:
    logits = distribution(shape, 5, 5003)
    agree(logits.to(dtype), *mixed_columns(5, 5003))


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.7}])
def test_each_token_gets_its_share_of_equally_spaced_numbers(options: dict[str, float]) -> None:
    logits = torch.randn(333) * 2
    numbers = grid(20).to(logits.device)
    agree(logits.expand(20, -1), *columns(numbers, 0.8, **options))  # type: ignore[arg-type]


def test_equals_go_to_the_lowest_id_over_all_blocks() -> None:
    for places in ([0, 5], [BLOCK, BLOCK - 1], [2 * BLOCK + 1, BLOCK + 3]):
        logits = torch.full((1, 2 * BLOCK + 5), -3.0)
        logits[0, places] = 2.0
        token_ids, _ = sample_tokens(logits, *columns(torch.zeros(1), temperature=0.0))
        assert token_ids.item() == min(places)


def test_ties_at_the_last_place_stay_in_order_of_vocabulary() -> None:
    logits = torch.zeros(BLOCK + 50)
    logits[[BLOCK + 7, 3]] = 1.0
    assert drawn(logits, 12, top_k=5) == {3, BLOCK + 7, 0, 1, 2}
    assert drawn(logits, 4, min_p=1.0) == {3, BLOCK + 7}
    equal = torch.full((20,), 4.0)
    assert drawn(equal, 8, top_p=0.199, top_k=0) == set(range(4))
    assert drawn(equal, 8, top_p=0.399, top_k=10) == set(range(4))
    assert drawn(equal, 20, top_p=1.0 - 2.0**-24) == set(range(20))


def test_top_p_counts_what_top_k_and_min_p_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert drawn(logits, 5, top_p=0.6) == {0, 1}
    assert drawn(logits, 5, top_k=2, top_p=0.56) == {0}  # 0.4 of 0.7
    assert drawn(logits, 5, min_p=0.6, top_p=0.56) == {0}
    assert drawn(logits, 5, min_p=0.4, top_p=0.8) == {0, 1, 2}  # 0.7 of 0.9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, BLOCK])
def test_nan_and_infinity_are_told_wherever_they_are(place: int, bad: float) -> None:
    logits = torch.randn(3, BLOCK + 100).bfloat16()
    options = mixed_columns(3, BLOCK + 100)
    clean, finite = sample_tokens(logits, *options)
    assert finite.all()
    logits[1, place] = bad
    spoilt, finite = sample_tokens(logits, *options)
    assert finite.tolist() == [True, False, True]
    clean[1] = 0
    assert torch.equal(spoilt, clean)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_what_is_minus_infinity_is_never_drawn(temperature: float) -> None:
    places = [0, 129, 655]
    logits = torch.full((len(places) + 1, 656), -torch.inf)
    for row, place in enumerate(places):
        logits[row, place] = -1e4
    for uniform in (0.0, 1.0 - 2.0**-53):
        for top_k, top_p in ((0, 1.0), (3, 0.9)):
            options = columns(torch.full((4,), uniform, dtype=torch.float64), temperature, top_k, top_p)
            token_ids, finite = sample_tokens(logits, *options)
            assert token_ids.tolist() == [*places, 0]
            assert finite.tolist() == [True] * len(places) + [False]


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.99}])
def test_a_number_on_the_edge_of_two_tokens_is_the_second_ones(options: dict[str, float]) -> None:
    logits = torch.tensor([-torch.inf, 1.0, 1.0, -torch.inf, 1.0, 1.0])
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75])
    token_ids, _ = sample_tokens(logits.expand(4, -1), *columns(edges, **options))  # type: ignore[arg-type]
    assert token_ids.tolist() == [1, 2, 4, 5]


def test_a_row_depends_on_itself_alone() -> None:
    logits = torch.randn(10, 3001).bfloat16()
    options = mixed_columns(10, 3001)
    together, _ = sample_tokens(logits, *options)
    order = torch.randperm(10)
    shuffled, _ = sample_tokens(logits[order], *(column[order] for column in options))
    assert torch.equal(shuffled, together[order])
