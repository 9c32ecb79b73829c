"""Changed logits against plain definitions, and sampling from them at every instruction set."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from kernel_checks import DTYPES
from sampling_checks import mixed_columns

from lorafleet.kernels.dispatch import forced
from lorafleet.kernels.logit_changes import Bias, LogitChanges, Mask, Penalties, change_logits_
from lorafleet.kernels.sampling import sample_changed_tokens, sample_tokens
from lorafleet.kernels.seen_tokens import seen_tokens

LARGEST = torch.finfo(torch.float32).max


@dataclass
class Asked:
    """What one row asks for, in Python's terms."""

    bias: list[tuple[int, float]] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    factors: tuple[float, float, float] | None = None  # repetition, frequency, presence
    allowed: set[int] | None = None

    def of(self, logits: list[float]) -> list[float]:
        """Return the changed logits by the definition, in float64."""
        x = list(logits)
        for token, value in self.bias:
            x[token] += value
        if self.factors is not None:
            repetition, frequency, presence = self.factors
            for token in {*self.prompt, *self.output}:
                x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
                count = self.output.count(token)
                x[token] = min(x[token] - frequency * count - presence * (count > 0), LARGEST)
        if self.allowed is not None:
            x = [value if token in self.allowed else -math.inf for token, value in enumerate(x)]
        return x


def draw_asked(rng: random.Random, vocab_size: int) -> Asked:
    def ids(most: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randrange(most))]

    asked = Asked(prompt=ids(40), output=ids(40))
    if rng.random() < 0.5:
        asked.bias = [(token, rng.choice([-math.inf, rng.uniform(-100, 100), 0.5])) for token in ids(30)]
    if rng.random() < 0.6:
        asked.factors = rng.choice([0.7, 1.0, 1.3]), rng.choice([-2.0, 0.0, 0.3]), rng.choice([-0.5, 0.0, 2.0])
    if rng.random() < 0.5:
        kind = rng.randrange(3)
        asked.allowed = (
            {*ids(30), rng.randrange(vocab_size)} if kind else set(range(0, vocab_size, 1 + rng.randrange(3)))
        )
    return asked


def gather(rows: dict[int, Asked], vocab_size: int, *, as_table: bool = False) -> LogitChanges:
    """Return the rows' changes as the kernel gets them. as_table: what was seen as a table, as on a GPU."""
    places = dict(enumerate(rows.values()))
    bias = [(place, token, value) for place, asked in places.items() for token, value in asked.bias]
    penalised = {place: asked for place, asked in places.items() if asked.factors is not None}
    masked = {place: asked for place, asked in places.items() if asked.allowed is not None}
    lists = [seen_tokens([*asked.prompt, *asked.output], len(asked.prompt), 0) for asked in penalised.values()]
    table = torch.zeros(len(lists), vocab_size, dtype=torch.int32)
    for codes, own in zip(table, lists if as_table else (), strict=as_table):
        codes[own[1:, 0].long()] = own[1:, 1]
    num_words = max((max(asked.allowed or ()) // 32 + 1 for asked in masked.values()), default=1)
    bits = np.zeros((len(masked), 32 * num_words), np.uint8)
    for own_bits, asked in zip(bits, masked.values(), strict=True):
        own_bits[list(asked.allowed or ())] = 1
    return LogitChanges(
        row_P=torch.tensor(list(rows)),
        bias=Bias(
            torch.tensor([place for place, _, _ in bias]),
            torch.tensor([token for _, token, _ in bias]),
            torch.tensor([value for _, _, value in bias]),
        )
        if bias
        else None,
        penalties=Penalties(
            torch.tensor(list(penalised)),
            torch.tensor([asked.factors for asked in penalised.values()]),
            table if as_table else lists,
        )
        if penalised
        else None,
        mask=Mask(
            torch.tensor(list(masked)), torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view("<i4"))
        )
        if masked
        else None,
    )


def draw_rows(num_rows: int, vocab_size: int) -> dict[int, Asked]:
    rng = random.Random(num_rows * vocab_size)
    drawn = {row: draw_asked(rng, vocab_size) for row in range(num_rows) if rng.random() < 0.7}
    return {row: asked for row, asked in drawn.items() if asked.bias or asked.factors or asked.allowed}


@pytest.mark.parametrize("as_table", [False, True])
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 577, 2051])
def test_changes_equal_their_definition(vocab_size: int, as_table: bool) -> None:
    rows = draw_rows(24, vocab_size)
    logits = torch.randn(len(rows), vocab_size) * 5
    expected = [asked.of(own) for own, asked in zip(logits.tolist(), rows.values(), strict=True)]
    change_logits_(logits, gather(rows, vocab_size, as_table=as_table))
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("each_level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 577, 2051])
def test_tokens_are_drawn_from_changed_logits(vocab_size: int, dtype: torch.dtype) -> None:
    num_rows = 40
    rows = draw_rows(num_rows, vocab_size)
    logits = (torch.randn(num_rows, vocab_size + 3) * 5).to(dtype)[:, :vocab_size]
    logits[3, vocab_size // 2] = math.nan
    logits[5] = -math.inf
    before, columns, changes = logits.clone(), mixed_columns(num_rows, vocab_size), gather(rows, vocab_size)
    token_ids, finite, possible = sample_changed_tokens(logits, *columns, changes)
    torch.testing.assert_close(logits, before, equal_nan=True, rtol=0, atol=0)
    assert finite.tolist() == [row not in (3, 5) for row in range(num_rows)]
    with forced(None):
        expected = sample_changed_tokens(logits, *columns, changes)
    assert torch.equal(finite, expected[1]) and torch.equal(possible, expected[2])
    assert (token_ids != expected[0]).sum() <= 1, "rounding decides"
    plain, _ = sample_tokens(logits, *columns)
    others = [row for row in range(num_rows) if row not in rows]
    assert torch.equal(token_ids[others], plain[others])
    for row, asked in rows.items():
        if possible[row] and asked.allowed is not None:
            assert int(token_ids[row]) in asked.allowed


@pytest.mark.usefixtures("each_version")
def test_a_row_with_no_token_left_is_finite_but_not_possible() -> None:
    rows = {1: Asked(bias=[(7, -math.inf)], allowed={7}), 2: Asked(allowed={7})}
    logits = torch.randn(4, 40)
    _, finite, possible = sample_changed_tokens(logits, *mixed_columns(4, 40), gather(rows, 40))
    assert finite.tolist() == [True] * 4
    assert possible.tolist() == [True, False, True, True]


@pytest.mark.usefixtures("each_version")
def test_a_penalty_that_overflows_is_no_broken_model() -> None:
    rows = {0: Asked(prompt=[2], output=[2], factors=(1e-39, 0.0, 0.0))}
    logits = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0]])
    columns = (
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int64),
        torch.ones(2),
        torch.zeros(2),
        torch.zeros(2).double(),
    )
    token_ids, finite, possible = sample_changed_tokens(logits, *columns, gather(rows, 3))
    assert token_ids.tolist() == [2, 1] and finite.all() and possible.all()


@pytest.mark.usefixtures("each_version")
def test_tokens_seen_that_the_row_has_not_have_no_effect() -> None:
    """A prompt for an adapter with ids of its own, in a batch of the base model's width."""
    rows = {0: Asked(prompt=[1, 50, 10**6], factors=(2.0, 0.0, 0.0))}
    columns = (
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int64),
        torch.ones(1),
        torch.zeros(1),
        torch.zeros(1).double(),
    )
    token_ids, _, _ = sample_changed_tokens(torch.tensor([[1.0, 3.0, 2.0]]), *columns, gather(rows, 3))
    assert token_ids.tolist() == [2]
