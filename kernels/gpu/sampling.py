"""Sampling in Triton: two launches for all rows, whatever their options; the host waits for neither.

The first finds each chunk's best token. The second has one program per row, which ends at once if the row is greedy. A
program that draws orders tokens by the bits of d = (max - x) / temperature: d is never negative, and the bits of such
numbers have the numbers' order. top_k and top_p keep the tokens up to some d, and the first few of those equal to it.
That d is found by bisection of its bits, with a count or a sum of weights over the row at each step. No row is sorted.
See kernels/sampling.py for the rules.

A pass over a row of 128,000 logits reads 256 KB that the first launch left in the cache; top_k and top_p take 31 passes
each, only for rows that use them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MAX_CHUNK = 4096
_LARGEST_KEY = tl.constexpr(0x7F800000)  # the bits of infinity
_NUM_BITS = tl.constexpr(31)


def sample_tokens(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    uniform_S: torch.Tensor,
    token_ids_S: torch.Tensor,
    finite_S: torch.Tensor,
) -> None:
    rows, vocab_size = logits_SV.shape
    if not rows:
        return
    chunk = max(16, min(_MAX_CHUNK, triton.next_power_of_2(vocab_size)))
    num_chunks = triton.cdiv(vocab_size, chunk)
    best = torch.empty(rows, num_chunks, dtype=torch.float32, device=logits_SV.device)
    best_id = torch.empty(rows, num_chunks, dtype=torch.int32, device=logits_SV.device)
    _find_best[(rows, num_chunks)](
        logits_SV, logits_SV.stride(0), best, best_id, vocab_size, CHUNK=chunk, num_warps=8, enable_fp_fusion=True
    )
    _pick[(rows,)](
        logits_SV,
        logits_SV.stride(0),
        best,
        best_id,
        temperature_S,
        top_k_S,
        top_p_S,
        min_p_S,
        uniform_S,
        token_ids_S,
        finite_S,
        vocab_size,
        num_chunks,
        CHUNK=chunk,
        BLOCK_CHUNKS=triton.next_power_of_2(num_chunks),
        num_warps=16,
        enable_fp_fusion=True,
    )


@triton.jit
def _find_best(logits, row_stride, best, best_id, vocab_size, CHUNK: tl.constexpr):
    """Store each chunk's largest logit and the first token that has it; NaN if any logit is NaN or +inf."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * row_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    x = x.to(tl.float32)
    is_broken = tl.max(((x != x) | (x == float("inf"))).to(tl.int32)) > 0
    largest = tl.max(x)
    first = tl.min(tl.where(x == largest, ids, vocab_size))
    place = row * tl.num_programs(1) + chunk
    tl.store(best + place, tl.where(is_broken, float("nan"), largest))
    tl.store(best_id + place, first)


@triton.jit
def _distances(logits, ids, vocab_size, largest, temperature):
    """Return d of some tokens, as numbers and as keys; infinity for ids after the vocabulary."""
    x = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    d = tl.div_rn(largest - x, temperature + tl.zeros_like(x))
    return d, d.to(tl.int32, bitcast=True)


@triton.jit
def _count(logits, vocab_size, largest, temperature, last_key, CHUNK: tl.constexpr):
    """Count the tokens with a key up to `last_key`."""
    counts = tl.zeros((CHUNK,), tl.int32)  # reduced once: a reduction waits for all threads
    for begin in range(0, vocab_size, CHUNK):
        ids = begin + tl.arange(0, CHUNK)
        _, key = _distances(logits, ids, vocab_size, largest, temperature)
        counts += ((key <= last_key) & (ids < vocab_size)).to(tl.int32)
    return tl.sum(counts)


@triton.jit
def _weigh(logits, vocab_size, largest, temperature, last_key, edge, edge_weight, CHUNK: tl.constexpr):
    """Sum the weights of the kept tokens with a key up to `last_key`; `edge_weight`: of those equal to `edge`."""
    weights = tl.zeros((CHUNK,), tl.float64)
    for begin in range(0, vocab_size, CHUNK):
        ids = begin + tl.arange(0, CHUNK)
        d, key = _distances(logits, ids, vocab_size, largest, temperature)
        weights += tl.where((key < edge) & (key <= last_key), tl.exp(-d), 0.0).to(tl.float64)
    return tl.sum(weights) + tl.where(edge <= last_key, edge_weight, 0.0)


@triton.jit
def _weight_of(key, count):
    """Return the weight of `count` tokens with this key."""
    each = tl.exp(-tl.where(count > 0, key, 0).to(tl.float32, bitcast=True))
    return each.to(tl.float64) * count


@triton.jit
def _pick(
    logits,
    row_stride,
    best,
    best_id,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    token_ids,
    finite,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    row = tl.program_id(0)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    is_chunk = chunk < num_chunks
    tops = tl.load(best + row * num_chunks + chunk, mask=is_chunk, other=float("-inf"))
    firsts = tl.load(best_id + row * num_chunks + chunk, mask=is_chunk, other=0)
    is_broken = tl.max((tops != tops).to(tl.int32)) > 0
    largest = tl.max(tl.where(tops != tops, float("-inf"), tops))
    is_finite = (largest > float("-inf")) & (is_broken == 0)
    tl.store(finite + row, is_finite)
    temperature = tl.load(temperatures + row)
    if (is_finite == 0) | (temperature <= 0.0):
        first = tl.min(tl.where(tops == largest, firsts, vocab_size))
        tl.store(token_ids + row, tl.where(is_finite, first, 0).to(tl.int64))
        return
    own = logits + row.to(tl.int64) * row_stride

    # Kept: the tokens with a key below `edge`, and the first `num_edge` of those equal to it; at least that many exist.
    min_p = tl.load(min_ps + row)
    edge = tl.where(min_p > 0.0, -tl.log(tl.maximum(min_p, 2e-38)), float("inf")).to(tl.int32, bitcast=True)
    edge = tl.maximum(edge, 0) + 1  # for min_p 1 the logarithm may be -0.0
    num_edge = 0
    top_k = tl.load(top_ks + row)
    if (top_k > 0) & (top_k < vocab_size):
        k = top_k.to(tl.int32)
        low, high, num_below = -1, edge * 0 + _LARGEST_KEY, 0  # the k-th key is above `low`, at most `high`
        for _ in range(_NUM_BITS):
            if high - low > 1:
                middle = low + (high - low) // 2
                count = _count(own, vocab_size, largest, temperature, middle, CHUNK)
                if count >= k:
                    high = middle
                else:
                    low, num_below = middle, count
        if high < edge:
            edge, num_edge = high, k - num_below
    top_p = tl.load(top_ps + row)
    if top_p < 1.0:
        edge_weight = _weight_of(edge, num_edge)
        wanted = top_p.to(tl.float64) * _weigh(
            own, vocab_size, largest, temperature, _LARGEST_KEY + 1, edge, edge_weight, CHUNK
        )
        low, high, weight_below = -1, edge, wanted * 0.0
        for _ in range(_NUM_BITS):
            if high - low > 1:
                middle = low + (high - low) // 2
                weight = _weigh(own, vocab_size, largest, temperature, middle, edge, edge_weight, CHUNK)
                if weight >= wanted:
                    high = middle
                else:
                    low, weight_below = middle, weight
        each = tl.maximum(_weight_of(high, 1), 1e-300)
        num_wanted = tl.minimum(tl.maximum(tl.ceil((wanted - weight_below) / each), 1.0), 1e9).to(tl.int32)
        num_edge = tl.where(high == edge, tl.minimum(num_edge, num_wanted), num_wanted)
        edge = high

    total = _weigh(own, vocab_size, largest, temperature, _LARGEST_KEY + 1, edge, _weight_of(edge, num_edge), CHUNK)
    # Sums in another order may end slightly below the total, and the target must not lie past all tokens.
    target = tl.minimum(tl.load(uniforms + row) * total, total * (1.0 - 1e-14))
    before = total * 0.0
    num_before = num_edge * 0
    chosen = num_before - 1
    for begin in range(0, vocab_size, CHUNK):
        if chosen < 0:
            ids = begin + tl.arange(0, CHUNK)
            d, key = _distances(own, ids, vocab_size, largest, temperature)
            is_below, is_edge = key < edge, (key == edge).to(tl.int32)
            weight = tl.where(is_below, tl.exp(-d), 0.0).to(tl.float64)
            num_here = tl.minimum(tl.sum(is_edge), num_edge - num_before)
            here = tl.sum(weight) + _weight_of(edge, num_here)
            if before + here > target:
                is_first = (is_edge > 0) & (tl.cumsum(is_edge, 0) <= num_here)
                weight = tl.where(is_first, tl.exp(-d).to(tl.float64), weight)
                is_past = (weight > 0.0) & (before + tl.cumsum(weight, 0) > target)
                last = tl.max(tl.where(weight > 0.0, ids, 0))
                chosen = tl.minimum(tl.min(tl.where(is_past, ids, vocab_size)), last)
            before += here
            num_before += num_here
    tl.store(token_ids + row, chosen)
