"""Checks for every version of the sampling kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorafleet.kernels.sampling import sample_tokens, sample_tokens_reference

ROUNDING = 1e-6  # of cumulative probabilities, between two correct results

TEMPERATURES = (0.0, 1e-30, 1e-5, 0.3, 1.0, 1.7, 100.0)
TOP_PS = (1.0, 1.0 - 2.0**-24, 0.999, 0.9, 0.5, 1e-9)
MIN_PS = (0.0, 0.0, 0.001, 0.3, 1.0)
SHAPES = ("flat", "identical", "ties", "peaked", "one far above", "mostly -inf")

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def columns(
    uniform: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Columns:
    """Return the same options for every random number."""
    rows = len(uniform)
    return (
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int64),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        uniform.double(),
    )


def mixed_columns(rows: int, vocab_size: int) -> Columns:
    def pick(values: tuple[float, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (rows,))]

    top_ks = (0, 0, 1, 2, 7, 50, vocab_size - 1, vocab_size, vocab_size + 5, 2**31)
    uniform = torch.rand(rows, dtype=torch.float64) * (torch.rand(rows) < 0.9)
    return pick(TEMPERATURES), pick(top_ks, torch.int64), pick(TOP_PS), pick(MIN_PS), uniform


def grid(count: int) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def drawn(logits: torch.Tensor, count: int = 2000, **options: float) -> set[int]:
    """Return the tokens drawn by a row's equally spaced random numbers."""
    token_ids, finite = sample_tokens(logits.expand(count, -1), *columns(grid(count), **options))  # type: ignore[arg-type]
    assert finite.all()
    return set(token_ids.tolist())


def agree(logits: torch.Tensor, *options: torch.Tensor) -> None:
    """Check that kernel and reference agree, except where rounding decides, which must be rare."""
    token_ids, finite = sample_tokens(logits, *options)
    expected_ids, expected_finite = sample_tokens_reference(logits, *options)
    assert torch.equal(finite, expected_finite)
    different = (token_ids != expected_ids).nonzero()[:, 0].tolist()
    assert len(different) <= 1 + len(logits) // 20
    for row in different:
        own = [column[row].item() for column in options]
        assert near_threshold(logits[row].float(), int(token_ids[row]), own), (row, own)
        assert near_threshold(logits[row].float(), int(expected_ids[row]), own), (row, own)


def near_threshold(logits: torch.Tensor, token: int, options: Sequence[float]) -> bool:
    """Return whether the token is right for thresholds and a random number within rounding of those given. In float64.

    options: a row of `Columns`.
    """
    temperature, top_k, top_p, min_p, uniform = options
    if temperature == 0.0:
        return False
    distance = (logits.max() - logits) / temperature
    order = distance.argsort(stable=True)
    for slack in (-ROUNDING, ROUNDING):
        weight = (-distance.double()).exp()
        weight[weight < min_p * (1 - slack)] = 0.0
        weight[order[int(top_k) or len(order) :]] = 0.0
        before = weight[order].cumsum(0) - weight[order]
        if top_p < 1.0:
            dropped = before >= (top_p + slack) * weight.sum()
            dropped[0] = False
            weight[order[dropped]] = 0.0
        end = weight.cumsum(0) / weight.sum()
        start = end[token] - weight[token] / weight.sum()
        if weight[token] > 0.0 and start - 4 * ROUNDING <= uniform <= end[token] + 4 * ROUNDING:
            return True
    return False


def distribution(shape: str, rows: int, vocab_size: int) -> torch.Tensor:
    """Return random logits of one of `SHAPES`."""
    noise = torch.randn(rows, vocab_size)
    return {
        "flat": noise * 0.01 + 5.0,
        "identical": torch.full_like(noise, -2.5),
        "ties": (noise * 2).round(),
        "peaked": noise + 12.0 * (torch.rand(rows, vocab_size) < 0.004),
        "one far above": noise * 0.01 + 10.0 * (torch.arange(vocab_size) == 4321),
        "mostly -inf": noise.masked_fill(torch.rand(rows, vocab_size) < 0.9, -torch.inf),
    }[shape]
