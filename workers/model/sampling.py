"""From logits to tokens, for the whole batch at once.

Every row is treated as if it were alone: what it gets depends on its logits, its options and its own counter-based
random number, never on its neighbours.

S rows that sample, V vocabulary, P rows that need something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lorafleet.workers.engine.request import Request, SamplingOptions, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one row got."""

    token_id: int
    logprobs: TokenLogprobs | None
    is_finite: bool  # False: the logits hold NaN or +inf, the token means nothing


def sample(logits_SV: torch.Tensor, requests: Sequence[Request], eos_token_ids: frozenset[int]) -> list[Sampled]:
    """Pick one token a row. `logits_SV` is float32 and may be overwritten.

    In vLLM's order: penalties, suppression of stop tokens before min_tokens, temperature, min_p, top_k and top_p, then
    the inverse of the cumulative distribution in vocabulary order at the row's random number. Log-probabilities are
    those of the untouched logits.
    """
    options = [request.sampling for request in requests]
    vocab_size = logits_SV.shape[1]
    finite = torch.isfinite(logits_SV.amax(dim=1)).tolist()
    wants_logprobs = [i for i, option in enumerate(options) if option.num_logprobs is not None]
    raw_PV = logits_SV[wants_logprobs].log_softmax(dim=1) if wants_logprobs else None

    _penalise(logits_SV, requests)
    _suppress_stops(logits_SV, requests, eos_token_ids)
    tokens = logits_SV.argmax(dim=1)
    drawn = [i for i, option in enumerate(options) if option.temperature > 0.0 and finite[i]]
    if drawn:
        rows = torch.tensor(drawn, device=logits_SV.device)
        picked = _draw(logits_SV[rows], [requests[i] for i in drawn])
        tokens[rows] = picked.clamp_(max=vocab_size - 1)

    token_ids = tokens.tolist()
    logprobs: list[TokenLogprobs | None] = [None] * len(requests)
    if raw_PV is not None:
        for i, value in zip(
            wants_logprobs,
            _logprobs(raw_PV, [token_ids[i] for i in wants_logprobs], options, wants_logprobs),
            strict=True,
        ):
            logprobs[i] = value
    return [Sampled(*row) for row in zip(token_ids, logprobs, finite, strict=True)]


def uniforms(seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per row, a pure function of (seed, choice index, output position).

    SplitMix64's finaliser (Steele, Lea, Flood 2014) chained over the three, 53 bits of the result.
    """
    state = np.array(seeds, np.uint64)
    with np.errstate(over="ignore"):
        for part in (choices, positions):
            state = _mix64(state + np.uint64(0x9E3779B97F4A7C15)) ^ np.array(part, np.uint64)
        state = _mix64(state + np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _penalise(logits_SV: torch.Tensor, requests: Sequence[Request]) -> None:
    """Repetition penalty over prompt and output (Keskar et al. 2019), presence and frequency penalties over output."""
    rows = [i for i, request in enumerate(requests) if request.sampling.needs_penalties]
    if not rows:
        return
    device, vocab_size = logits_SV.device, logits_SV.shape[1]
    output_PV = _counts([requests[i].token_ids[requests[i].num_prompt_tokens :] for i in rows], vocab_size, device)
    prompt_PV = _counts([requests[i].token_ids[: requests[i].num_prompt_tokens] for i in rows], vocab_size, device)

    def column(value: Callable[[SamplingOptions], float]) -> torch.Tensor:
        return torch.tensor([value(requests[i].sampling) for i in rows], device=device)[:, None]

    logits_PV = logits_SV[rows]
    repetition_P1 = column(lambda s: s.repetition_penalty)
    repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition_P1, logits_PV * repetition_P1)
    logits_PV = torch.where((output_PV + prompt_PV) > 0, repeated_PV, logits_PV)
    logits_PV -= column(lambda s: s.frequency_penalty) * output_PV
    logits_PV -= column(lambda s: s.presence_penalty) * (output_PV > 0)
    logits_SV[rows] = logits_PV


def _counts(token_ids: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> torch.Tensor:
    """[P, V]: how often each token occurs in each list."""
    lengths = [len(ids) for ids in token_ids]
    flat = np.concatenate([np.asarray(ids, np.int64) for ids in token_ids])
    flat += np.repeat(np.arange(len(token_ids), dtype=np.int64) * vocab_size, lengths)
    counts = np.bincount(flat, minlength=len(token_ids) * vocab_size)
    return torch.from_numpy(counts.astype(np.float32)).to(device).view(len(token_ids), vocab_size)


def _suppress_stops(logits_SV: torch.Tensor, requests: Sequence[Request], eos_token_ids: frozenset[int]) -> None:
    rows: list[int] = []
    columns: list[int] = []
    for i, request in enumerate(requests):
        sampling = request.sampling
        if request.num_output_tokens < sampling.min_tokens:
            stops = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else eos_token_ids)
            rows.extend([i] * len(stops))
            columns.extend(stops)
    if rows:
        logits_SV[rows, columns] = -torch.inf


def _draw(logits_PV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """One token per row by temperature, min_p, top_k, top_p and the row's random number."""
    device, vocab_size = logits_PV.device, logits_PV.shape[1]
    options = [request.sampling for request in requests]
    logits_PV = logits_PV / torch.tensor([option.temperature for option in options], device=device)[:, None]
    # A temperature near zero overflows to inf; the maximum taken off first keeps exp() in range.
    logits_PV -= logits_PV.amax(dim=1, keepdim=True)
    if any(option.min_p > 0.0 for option in options):
        floor = torch.tensor([option.min_p for option in options], device=device).log()[:, None]
        logits_PV.masked_fill_(logits_PV < floor, -torch.inf)
    cut = [i for i, option in enumerate(options) if 0 < option.top_k < vocab_size or option.top_p < 1.0]
    if cut:
        logits_PV[cut] = _keep_top(logits_PV[cut], [options[i] for i in cut])
    cumulative_PV = logits_PV.softmax(dim=1).double().cumsum(dim=1)
    numbers = uniforms(
        [option.seed for option in options],
        [option.choice for option in options],
        [request.num_output_tokens for request in requests],
    )
    targets_P1 = torch.from_numpy(numbers).to(device)[:, None] * cumulative_PV[:, -1:]
    return torch.searchsorted(cumulative_PV, targets_P1, right=True)[:, 0]


def _keep_top(logits_PV: torch.Tensor, options: Sequence[SamplingOptions]) -> torch.Tensor:
    """Logits with everything outside top_k, then outside top_p of what is left, at -inf. The best always stays."""
    device, vocab_size = logits_PV.device, logits_PV.shape[1]
    ordered_PV, index_PV = logits_PV.sort(dim=1, descending=True, stable=True)
    top_k = torch.tensor([option.top_k or vocab_size for option in options], device=device)[:, None]
    top_p = torch.tensor([option.top_p for option in options], device=device)[:, None]
    ordered_PV.masked_fill_(torch.arange(vocab_size, device=device)[None, :] >= top_k, -torch.inf)
    probabilities_PV = ordered_PV.softmax(dim=1)
    before_PV = probabilities_PV.cumsum(dim=1) - probabilities_PV
    drop_PV = (before_PV >= top_p) & (top_p < 1.0)
    drop_PV[:, 0] = False
    ordered_PV.masked_fill_(drop_PV, -torch.inf)
    return torch.empty_like(logits_PV).scatter_(1, index_PV, ordered_PV)


def _logprobs(
    raw_PV: torch.Tensor, token_ids: Sequence[int], options: Sequence[SamplingOptions], rows: Sequence[int]
) -> list[TokenLogprobs]:
    chosen_P1 = raw_PV.gather(1, torch.tensor(token_ids, device=raw_PV.device)[:, None])
    ranks = (raw_PV > chosen_P1).sum(dim=1).add_(1).tolist()
    most = max(options[i].num_logprobs or 0 for i in rows)
    top = raw_PV.topk(most, dim=1) if most else None
    result = []
    for p, (i, chosen, rank) in enumerate(zip(rows, chosen_P1[:, 0].tolist(), ranks, strict=True)):
        count = options[i].num_logprobs or 0
        ids = top.indices[p, :count].tolist() if top is not None else []
        values = top.values[p, :count].tolist() if top is not None else []
        result.append(TokenLogprobs(chosen, rank, tuple(ids), tuple(values)))
    return result
