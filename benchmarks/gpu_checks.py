"""Checks each Triton kernel against its reference, on the device and in each dtype, before any figure counts.

The worst row of a result decides: |ours - reference| / |reference|, in Euclidean norms of the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lorafleet.kernels import paged_kv
from lorafleet.kernels.activation import silu_mul
from lorafleet.kernels.attention import paged_attention
from lorafleet.kernels.dispatch import forced
from lorafleet.kernels.lora import LoraSegments, LoraSlots, lora_add_
from lorafleet.kernels.norm import fused_add_rms_norm_, rms_norm
from lorafleet.kernels.rope import rope_kv_write_
from lorafleet.kernels.sampling import sample_tokens

# Some 16-bit numbers are rounded to the other neighbour.
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
_MAX_DIFFERENT = 0.05  # share of drawn tokens, where a random number lies on the border of two
_PAGE = 16


@dataclass(frozen=True, slots=True)
class Check:
    """The error of a kernel against its reference."""

    kernel: str
    dtype: str
    error: float  # NaN where it failed
    limit: float
    note: str = ""  # why it failed

    @property
    def is_met(self) -> bool:
        return self.error <= self.limit

    def as_json(self) -> dict[str, Any]:
        error = None if math.isnan(self.error) else self.error  # JSON has no NaN
        return asdict(self) | {"error": error, "is_met": self.is_met}

    def line(self) -> str:
        verdict = "ok" if self.is_met else f"WRONG {self.note}".rstrip()
        return f"{self.kernel:<40}{self.dtype:<10}{self.error:>10.1e}{self.limit:>10.1e}  {verdict}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the layer whose kernels are checked."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int
    vocab_size: int
    num_seqs: int  # of a decode step
    num_prompt_tokens: int
    max_rank: int

    @property
    def q_size(self) -> int:
        return self.num_q_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


LLAMA_3 = Sizes(32, 8, 128, 14336, 128256, num_seqs=64, num_prompt_tokens=700, max_rank=64)
LLAMA_2 = Sizes(32, 32, 128, 11008, 32000, num_seqs=64, num_prompt_tokens=700, max_rank=64)
TINY = Sizes(2, 1, 16, 48, 97, num_seqs=3, num_prompt_tokens=20, max_rank=8)

# Runs an op on fresh copies of one input, and returns its outputs.
_Op = Callable[[], tuple[torch.Tensor, ...]]


def run_checks(device: torch.device) -> Iterator[Check]:
    """Run the checks one after the other; one that cannot run counts as failed, and the next follows."""
    for dtype in LIMITS:
        for sizes in _sizes(dtype, device):
            for name, op in _ops(sizes, dtype, device):
                yield _compared(name, op, dtype, device)
            if dtype == torch.bfloat16:
                yield _sampled(sizes, dtype, device)


def _sizes(dtype: torch.dtype, device: torch.device) -> tuple[Sizes, ...]:
    if device.type != "cuda":
        return (TINY,)
    return (LLAMA_3, LLAMA_2) if dtype == torch.bfloat16 else (LLAMA_3,)  # few, since compiling each takes seconds


def row_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the error of the worst row; NaN if either has one."""
    ours, expected = ours.double().flatten(1), expected.double().flatten(1)
    norms = expected.norm(dim=1).clamp_min(1e-30)
    return float(((ours - expected).norm(dim=1) / norms).max())


def _compared(name: str, op: _Op, dtype: torch.dtype, device: torch.device) -> Check:
    # Triton's interpreter truncates where hardware rounds to nearest.
    limit = LIMITS[dtype] * (1 if device.type == "cuda" else 2)
    title = str(dtype).removeprefix("torch.")
    try:
        ours = op()
        with forced(None):
            expected = op()
        errors = [row_error(*pair) for pair in zip(ours, expected, strict=True)]
        # max() would skip NaN.
        error = next((error for error in errors if math.isnan(error)), max(errors))
        return Check(name, title, error, limit)
    except Exception as error:  # the next kernel may work
        return Check(name, title, float("nan"), limit, _why(error))


def _sampled(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Check:
    """Check greedy rows and drawing rows, with and without top-k, top-p and min-p."""
    name = f"sample_tokens, vocabulary {sizes.vocab_size}"
    title = str(dtype).removeprefix("torch.")
    try:
        rows = 4 * sizes.num_seqs
        logits = _normal((rows, sizes.vocab_size), dtype, device, 3.0)

        def column(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device).repeat(sizes.num_seqs)

        columns = (
            column(0.0, 0.7, 1.0, 1.3),
            column(0, 50, 0, 0, dtype=torch.int64),
            column(1.0, 1.0, 0.9, 1.0),
            column(0.0, 0.0, 0.0, 0.05),
            torch.rand(rows, dtype=torch.float64, device=device),
        )
        token_ids, finite = sample_tokens(logits, *columns)
        with forced(None):
            expected_ids, expected_finite = sample_tokens(logits, *columns)
        is_different = (token_ids != expected_ids) | (finite != expected_finite)
        greedy = columns[0] == 0.0
        error = 1.0 if bool(is_different[greedy].any()) else float(is_different.double().mean())
        return Check(name, title, error, _MAX_DIFFERENT)
    except Exception as error:
        return Check(name, title, float("nan"), _MAX_DIFFERENT, _why(error))


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, std: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std)


def _ops(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, _Op]]:
    heads = f"{sizes.num_q_heads}/{sizes.num_kv_heads} heads"
    hidden, tokens = sizes.q_size, sizes.num_prompt_tokens
    x, residual = _normal((tokens, hidden), dtype, device), _normal((tokens, hidden), dtype, device)
    weights = _normal((3, hidden), dtype, device)
    which = (torch.arange(tokens, device=device) % 3).int()
    gate_up = _normal((tokens, 2 * sizes.inner), dtype, device)

    def fused_norm(chosen: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        own_x, own_residual = x.clone(), residual.clone()
        fused_add_rms_norm_(own_x, own_residual, weights, 1e-5, chosen)
        return own_x, own_residual

    yield f"rms_norm, {hidden}", lambda: (rms_norm(x, weights, 1e-5),)
    yield f"rms_norm, {hidden}, chosen", lambda: (rms_norm(x, weights, 1e-5, which_T=which),)
    yield f"fused_add_rms_norm_, {hidden}", lambda: fused_norm(None)
    yield f"fused_add_rms_norm_, {hidden}, chosen", lambda: fused_norm(which)
    yield f"silu_mul, {sizes.inner}", lambda: (silu_mul(gate_up),)
    yield f"rope_kv_write_, {heads}", _rope(sizes, dtype, device)
    seqs, prompt = sizes.num_seqs, sizes.num_prompt_tokens
    for name, lengths in (
        ("decode", [(1, 1 + 37 * s % (2 * prompt)) for s in range(seqs)]),
        ("prompts", [(prompt // 2, prompt // 2), (prompt // 3, prompt)]),
        ("mix", [(prompt // 2, prompt), *((1, 1 + 53 * s % prompt) for s in range(seqs // 2))]),
    ):
        yield f"paged_attention, {heads}, {name}", _attention(sizes, dtype, device, lengths)
    widths = (sizes.q_size, sizes.kv_size, sizes.kv_size)
    for name, num_in, outputs, rows in (
        ("q,k,v, decode", hidden, widths, seqs),
        ("down, decode", sizes.inner, (hidden,), seqs),
        ("q,k,v, prompts", hidden, widths, prompt),
    ):
        yield f"lora_add_, {name}", _lora(sizes, dtype, device, num_in, outputs, rows)


def _rope(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> _Op:
    tokens = sizes.num_prompt_tokens
    qkv = _normal((tokens, sizes.q_size + 2 * sizes.kv_size), dtype, device)
    positions = torch.randint(tokens, (tokens,), device=device)
    angles = torch.outer(torch.arange(tokens), 10000.0 ** -torch.linspace(0, 1, sizes.head_dim // 2)).to(device)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).float().contiguous()
    num_pages = -(-tokens // _PAGE)
    slots = torch.randperm(num_pages * _PAGE, device=device)[:tokens]
    pages = paged_kv.empty(num_pages, sizes.num_kv_heads, _PAGE, sizes.head_dim, dtype, device)

    def run() -> tuple[torch.Tensor, ...]:
        own, keys, values = qkv.clone(), *(torch.zeros_like(part) for part in pages)
        rope_kv_write_(own, cos_sin, positions, keys, values, slots, sizes.num_q_heads, sizes.num_kv_heads)
        return own, keys, values

    return run


def _attention(sizes: Sizes, dtype: torch.dtype, device: torch.device, lengths: list[tuple[int, int]]) -> _Op:
    """lengths: queries and keys of each sequence. Pages hold NaN after its last key."""
    most = max(-(-context // _PAGE) for _, context in lengths)
    keys, values = paged_kv.empty(len(lengths) * most, sizes.num_kv_heads, _PAGE, sizes.head_dim, dtype, device)
    keys.normal_(), values.normal_()
    table = torch.randperm(len(lengths) * most, device=device).int().view(len(lengths), most)
    for pages, (_, context) in zip(table.tolist(), lengths, strict=True):
        if context % _PAGE:
            last = pages[context // _PAGE]
            keys[last, :, context % _PAGE :] = values[last, :, context % _PAGE :] = torch.nan
    starts = torch.tensor([0, *(count for count, _ in lengths)], device=device).cumsum(0).int()
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32, device=device)
    q = _normal((sum(count for count, _ in lengths), sizes.q_size), dtype, device)
    scale = sizes.head_dim**-0.5
    return lambda: (paged_attention(q, keys, values, table, starts, contexts, sizes.num_q_heads, scale),)


def _lora(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, num_in: int, widths: tuple[int, ...], rows: int
) -> _Op:
    """Check adapters of ranks up to the largest, one of which skips a slice; the first rows have no adapter."""
    num_slots, num_out, rank = 4, sum(widths), sizes.max_rank
    ranks = torch.tensor([rank, rank // 4, 1, rank // 2], dtype=torch.int32)[:, None].repeat(1, len(widths))
    if len(widths) > 1:
        ranks[1, 1] = 0
    slots = LoraSlots(
        _normal((num_slots, len(widths), rank, num_in), dtype, device, num_in**-0.5),
        _normal((num_slots, rank, num_out), dtype, device, 0.2),
        ranks.to(device),
        torch.full((num_slots, len(widths)), 2.0, device=device),
        torch.zeros(num_slots, len(widths), dtype=torch.int32, device=device),
        torch.ones(num_slots, num_out, device=device),
        torch.ones(num_slots, num_out, device=device),
        torch.tensor(widths, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
    )
    bounds = torch.tensor([rows * part // 6 for part in range(1, 6)] + [rows], dtype=torch.int32, device=device)
    used = torch.tensor([2, 0, 3, 1, 0], dtype=torch.int32, device=device)
    segments = LoraSegments(bounds[:-1].clone(), bounds[1:].clone(), used, torch.ones(5, device=device))
    x, y = _normal((rows, num_in), dtype, device), _normal((rows, num_out), dtype, device)

    def run() -> tuple[torch.Tensor, ...]:
        own = y.clone()
        lora_add_(own, x, slots, segments)
        return (own,)

    return run
