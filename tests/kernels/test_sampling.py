"""The sampling kernel against its reference and against plain definitions, at every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES
from sampling_checks import (
    MIN_PS,
    SHAPES,
    TEMPERATURES,
    TOP_PS,
    agree,
    columns,
    distribution,
    drawn,
    grid,
    mixed_columns,
)

from lorafleet.kernels.dispatch import forced
from lorafleet.kernels.sampling import sample_tokens, sample_tokens_reference

pytestmark = pytest.mark.usefixtures("each_level")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 16, 127, 128, 577, 1001, 49_152])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_rows_of_mixed_options(rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(rows, vocab_size + 3) * 3).to(dtype)[:, :vocab_size]
    before = logits.clone()
    agree(logits, *mixed_columns(rows, vocab_size))
    assert torch.equal(logits, before), "they are not to be changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_distributions(shape: str, dtype: torch.dtype) -> None:
    logits = distribution(shape, 60, 5003)
    agree(logits.to(dtype), *mixed_columns(60, 5003))


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(
        st.sampled_from([-math.inf, -20.0, -1.0, -0.0, 0.0, 1e-3, 1.0, 1.5, 30.0]), min_size=1, max_size=300
    ),
    temperature=st.sampled_from(TEMPERATURES),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from(TOP_PS),
    min_p=st.sampled_from(MIN_PS),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
)
def test_any_row(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> None:
    agree(torch.tensor([logits]), *columns(torch.tensor([uniform]).double(), temperature, top_k, top_p, min_p))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (9, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1)])
def test_each_token_gets_its_share_of_equally_spaced_numbers(
    temperature: float, top_k: int, top_p: float, min_p: float, native: bool
) -> None:
    count, vocab_size = 50_000, 333
    logits = torch.randn(vocab_size) * 2
    probability = (logits.double() / temperature).softmax(0)
    order = probability.argsort(descending=True)
    probability[probability < min_p * probability.max()] = 0.0
    probability[order[top_k or vocab_size :]] = 0.0
    probability[order[probability[order].cumsum(0) - probability[order] >= top_p]] = 0.0
    probability /= probability.sum()
    sample = sample_tokens if native else sample_tokens_reference
    token_ids, _ = sample(logits.expand(count, -1), *columns(grid(count), temperature, top_k, top_p, min_p))
    shares = torch.bincount(token_ids, minlength=vocab_size)
    assert (shares - count * probability).abs().max() < 1.1
    assert (token_ids.diff() >= 0).all(), "in order of vocabulary"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    for places in ([0, 5], [17, 16], [300, 2, 650], [130, 129, 999], [1000, 40]):
        logits = torch.full((1, 1001), -3.0, dtype=dtype)
        logits[0, places] = 2.0
        token_ids, _ = sample_tokens(logits, *columns(torch.zeros(1), temperature=0.0))
        assert token_ids.item() == min(places)
    signed_zeros = torch.tensor([-1.0, -0.0, 0.0, -0.0]).to(dtype)
    assert drawn(signed_zeros, temperature=0.0) == {1}
    assert drawn(signed_zeros, top_k=2) == {1, 2}
    assert drawn(-signed_zeros[1:], top_k=2) == {0, 1}


def test_ties_at_the_last_place_stay_in_order_of_vocabulary() -> None:
    logits = torch.zeros(1000)
    logits[[700, 3]] = 1.0
    assert drawn(logits, top_k=5) == {3, 700, 0, 1, 2}
    assert drawn(torch.full((1000,), 4.0), top_k=600) == set(range(600))
    assert drawn(torch.full((1000,), 4.0), top_p=0.4995) == set(range(500))
    assert drawn(torch.full((1000,), 4.0), top_p=0.4995, top_k=100) == set(range(50))
    assert drawn(torch.full((1000,), 4.0), top_p=1.0 - 2.0**-24) == set(range(1000))
    assert drawn(logits, min_p=1.0) == {3, 700}


def test_top_p_counts_what_top_k_and_min_p_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert drawn(logits, top_p=0.6) == {0, 1}
    assert drawn(logits, top_k=2, top_p=0.56) == {0}  # 0.4 of 0.7
    assert drawn(logits, min_p=0.6, top_p=0.56) == {0}
    assert drawn(logits, min_p=0.4, top_p=0.8) == {0, 1, 2}  # 0.7 of 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1, 128, 500, 639, 640, 655])
def test_nan_and_infinity_are_told_wherever_they_are(place: int, bad: float, dtype: torch.dtype) -> None:
    rows, vocab_size = 9, 656
    logits = torch.randn(rows, vocab_size).to(dtype)
    options = mixed_columns(rows, vocab_size)
    clean, finite = sample_tokens(logits, *options)
    assert finite.all()
    logits[4, place] = bad
    if math.isnan(bad):
        logits[4, place] = logits[4, place].copysign(torch.tensor(bad))
    spoilt, finite = sample_tokens(logits, *options)
    assert finite.tolist() == [row != 4 for row in range(rows)]
    clean[4] = 0
    assert torch.equal(spoilt, clean)
    agree(logits, *options)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_what_is_minus_infinity_is_never_drawn(temperature: float, native: bool) -> None:
    sample = sample_tokens if native else sample_tokens_reference
    places = [0, 7, 129, 640, 655, 100]
    logits = torch.full((len(places) + 1, 656), -torch.inf)
    for row, place in enumerate(places):
        logits[row, place] = -1e4
    for uniform in (0.0, 0.5, 1.0 - 2.0**-53):
        for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.9), (3, 0.9)):
            token_ids, finite = sample(logits, *columns(torch.full((7,), uniform).double(), temperature, top_k, top_p))
            assert token_ids.tolist() == [*places, 0]
            assert finite.tolist() == [True] * len(places) + [False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("native", [True, False])
def test_temperatures_far_from_one(native: bool, dtype: torch.dtype) -> None:
    sample = sample_tokens if native else sample_tokens_reference
    logits = (torch.randn(1, 2000) * 5).to(dtype)
    logits[0, 1234] = 40.0
    for temperature in (1e-45, 1e-30, 1e-5):
        for top_p in (1.0, 0.9):
            token_ids, finite = sample(logits, *columns(torch.tensor([0.999]), temperature, top_p=top_p))
            assert finite.all() and token_ids.item() == 1234
    # So hot that all tokens are about equally likely.
    count = 4000
    token_ids, _ = sample((logits / 40).expand(count, -1), *columns(grid(count), 100.0))
    assert (token_ids - grid(count) * 2000).abs().max() < 30


@pytest.mark.parametrize("native", [True, False])
def test_no_random_number_leads_behind_the_last_token(native: bool) -> None:
    """Also true for the largest number below 1, where a product rounds up to the whole sum."""
    sample = sample_tokens if native else sample_tokens_reference
    logits = torch.randn(300, 70)
    logits[:, 60:] = -torch.inf
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.7)):
        token_ids, _ = sample(logits, *columns(torch.full((300,), 1.0 - 2.0**-53).double(), 1.0, top_k, top_p))
        assert (token_ids < 60).all()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.99}])
def test_a_number_on_the_edge_of_two_tokens_is_the_second_ones(options: dict[str, float], native: bool) -> None:
    sample = sample_tokens if native else sample_tokens_reference
    logits = torch.tensor([-torch.inf, 1.0, 1.0, -torch.inf, 1.0, 1.0])
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75])
    token_ids, _ = sample(logits.expand(4, -1), *columns(edges, **options))  # type: ignore[arg-type]
    assert token_ids.tolist() == [1, 2, 4, 5]


def test_a_row_depends_on_itself_alone() -> None:
    logits = torch.randn(40, 3001).bfloat16()
    options = mixed_columns(40, 3001)
    together, _ = sample_tokens(logits, *options)
    order = torch.randperm(40)
    shuffled, _ = sample_tokens(logits[order], *(column[order] for column in options))
    assert torch.equal(shuffled, together[order])
    alone = [sample_tokens(logits[i : i + 1], *(column[i : i + 1] for column in options))[0].item() for i in range(40)]
    assert alone == together.tolist()


def test_without_kernels_the_reference_runs() -> None:
    logits = torch.randn(5, 100).bfloat16()
    options = mixed_columns(5, 100)
    with forced(None):
        ours = sample_tokens(logits, *options)
    for own, expected in zip(ours, sample_tokens_reference(logits, *options), strict=True):
        assert torch.equal(own, expected)
