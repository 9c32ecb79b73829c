"""Sampling: logits to tokens, for the whole batch at once.

A row's token depends on its logits, its options and its own counter-based random number, never on its neighbours. One
kernel picks the tokens of all rows (kernels/sampling.py). This file prepares the kernel's columns of options, and does
what only some requests need. On a GPU nothing here waits for the device except `PendingSamples.results`.

S rows that sample, V vocabulary, P rows with special needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from lorafleet.kernels.sampling import sample_tokens
from lorafleet.workers.model.transfer import Fetched, send
from lorafleet.workers.scheduling.logprobs import TokenLogprobs
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions


@dataclass(frozen=True, slots=True)
class Sampled:
    """The result of one row."""

    token_id: int
    logprobs: TokenLogprobs | None
    is_finite: bool  # False: the logits hold NaN or +inf, the token means nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """The options of some requests as columns. Valid until the batch changes."""

    requests: list[Request]
    temperature_S: torch.Tensor
    top_k_S: torch.Tensor
    top_p_S: torch.Tensor
    min_p_S: torch.Tensor
    zeros_S: torch.Tensor  # random numbers for a batch that needs none
    draws: bool  # any row is not greedy
    seeds: list[int]
    choices: list[int]
    penalised: list[int]  # rows
    held: list[tuple[int, int]]  # (row, min_tokens) where that is more than 0
    logged: list[int]  # rows that want log-probabilities

    @classmethod
    def gather(cls, requests: Sequence[Request], device: torch.device) -> _Batch:
        options = [request.sampling for request in requests]

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return send(torch.tensor(values, dtype=dtype), device)

        temperatures = [option.temperature for option in options]
        return cls(
            requests=list(requests),
            temperature_S=column(temperatures),
            top_k_S=column([option.top_k for option in options], torch.int64),
            top_p_S=column([option.top_p for option in options]),
            min_p_S=column([option.min_p for option in options]),
            zeros_S=column([0.0] * len(options), torch.float64),
            draws=any(temperature > 0.0 for temperature in temperatures),
            seeds=[option.seed for option in options],
            choices=[option.choice for option in options],
            penalised=[i for i, option in enumerate(options) if option.needs_penalties],
            held=[(i, option.min_tokens) for i, option in enumerate(options) if option.min_tokens],
            logged=[i for i, option in enumerate(options) if option.logprobs is not None],
        )

    def uniform_S(self) -> torch.Tensor:
        """Return this step's random numbers, float64."""
        if not self.draws:
            return self.zeros_S
        positions = [request.num_output_tokens for request in self.requests]
        return send(torch.from_numpy(uniforms(self.seeds, self.choices, positions)), self.zeros_S.device)


class PendingSamples:
    """The launched result of `Sampler.sample`."""

    def __init__(
        self,
        token_ids_S: torch.Tensor,
        finite_S: torch.Tensor,
        logged: Sequence[int] = (),
        wanted: Sequence[SamplingOptions] = (),
        logprobs: tuple[torch.Tensor, ...] = (),
    ) -> None:
        """token_ids_S: int64, on the device. logged: rows with log-probabilities; wanted: the options of each."""
        self.token_ids_S = token_ids_S
        self._logged = logged
        self._wanted = wanted
        self._fetched = Fetched((token_ids_S, finite_S, *logprobs))

    def results(self) -> list[Sampled]:
        """Return one result per row. Waits for the device."""
        token_ids_S, finite_S, *of_logged = (tensor.tolist() for tensor in self._fetched.tensors())
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids_S)
        for i, options, chosen, rank, ids, values in zip(self._logged, self._wanted, *of_logged, strict=True):
            count = _num_candidates(options)
            logprobs[i] = TokenLogprobs(chosen, rank, tuple(ids[:count]), tuple(values[:count]))
        return list(map(Sampled, token_ids_S, logprobs, finite_S))


class Sampler:
    """Picks the tokens of successive batches."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._batch: _Batch | None = None  # the last batch

    def sample(self, logits_SV: torch.Tensor, requests: list[Request]) -> PendingSamples:
        """Pick one token per row. `logits_SV` has the model's dtype and is not changed.

        The order is vLLM's: penalties, suppression of stop tokens before min_tokens, then the steps of
        kernels/sampling.py. Log-probabilities are those of the original logits.
        """
        batch, device = self._batch, logits_SV.device
        if batch is None or batch.requests != requests:  # compares identities
            batch = self._batch = _Batch.gather(requests, device)
        temperature_S, uniform_S = batch.temperature_S, batch.uniform_S()
        suppressed = [i for i, min_tokens in batch.held if requests[i].num_output_tokens < min_tokens]
        altered = sorted({*batch.penalised, *suppressed})
        if altered:
            # For these rows only the finiteness of this result is used.
            rows_P = send(torch.tensor(altered), device)
            temperature_S = temperature_S.index_fill(0, rows_P, 0.0)
        token_ids_S, finite_S = sample_tokens(
            logits_SV, temperature_S, batch.top_k_S, batch.top_p_S, batch.min_p_S, uniform_S
        )
        if altered:
            logits_PV = logits_SV[rows_P].float()
            requests_P = [requests[i] for i in altered]
            _penalise(logits_PV, requests_P)
            _suppress_stops(logits_PV, requests_P, self._eos_token_ids)
            columns = (batch.temperature_S, batch.top_k_S, batch.top_p_S, batch.min_p_S, uniform_S)
            token_ids_S[rows_P], _ = sample_tokens(logits_PV, *(column[rows_P] for column in columns))
        if not batch.logged:
            return PendingSamples(token_ids_S, finite_S)
        wanted = [requests[i].sampling for i in batch.logged]
        rows_P = send(torch.tensor(batch.logged), device)
        raw_PV = logits_SV[rows_P].float().log_softmax(dim=1)
        logprobs = logprobs_of(raw_PV, token_ids_S[rows_P], max(map(_num_candidates, wanted)))
        _put_named(raw_PV, wanted, *logprobs[2:])
        return PendingSamples(token_ids_S, finite_S, batch.logged, wanted, logprobs)


def uniforms(seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return one number in [0, 1) per row, a pure function of (seed, choice index, output position).

    SplitMix64's finaliser (Steele, Lea, Flood 2014) is chained over the three; 53 bits of the result are used.
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
    """Apply the repetition penalty over prompt and output (Keskar et al. 2019), presence and frequency over output."""
    rows = [i for i, request in enumerate(requests) if request.sampling.needs_penalties]
    if not rows:
        return
    device, vocab_size = logits_SV.device, logits_SV.shape[1]
    output_PV = _counts([requests[i].token_ids[requests[i].num_prompt_tokens :] for i in rows], vocab_size, device)
    prompt_PV = _counts([requests[i].token_ids[: requests[i].num_prompt_tokens] for i in rows], vocab_size, device)

    def column(value: Callable[[SamplingOptions], float]) -> torch.Tensor:
        return send(torch.tensor([value(requests[i].sampling) for i in rows], dtype=torch.float32), device)[:, None]

    rows_P = send(torch.tensor(rows), device)
    logits_PV = logits_SV[rows_P]
    repetition_P1 = column(lambda s: s.repetition_penalty)
    repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition_P1, logits_PV * repetition_P1)
    logits_PV = torch.where((output_PV + prompt_PV) > 0, repeated_PV, logits_PV)
    logits_PV -= column(lambda s: s.frequency_penalty) * output_PV
    logits_PV -= column(lambda s: s.presence_penalty) * (output_PV > 0)
    # A repetition penalty near zero overflows to +inf, which does not mean a broken model.
    logits_SV[rows_P] = logits_PV.clamp_(max=torch.finfo(torch.float32).max)


def _counts(token_ids: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Count each token's occurrences in each list, [P, V]."""
    lengths = [len(ids) for ids in token_ids]
    flat = np.concatenate([np.asarray(ids, np.int64) for ids in token_ids])
    flat += np.repeat(np.arange(len(token_ids), dtype=np.int64) * vocab_size, lengths)
    counts = np.bincount(flat, minlength=len(token_ids) * vocab_size)
    return send(torch.from_numpy(counts.astype(np.float32)), device).view(len(token_ids), vocab_size)


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
        at = send(torch.tensor([rows, columns]), logits_SV.device)
        logits_SV[at[0], at[1]] = -torch.inf


def logprobs_of(raw_PV: torch.Tensor, token_ids_P: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Return each row's log-probability and rank, [P], and ids and log-probabilities of the best, [P, count]."""
    chosen_P1 = raw_PV.gather(1, token_ids_P[:, None])
    ranks_P = (raw_PV > chosen_P1).sum(dim=1).add_(1)
    top = raw_PV.topk(count, dim=1)
    return chosen_P1[:, 0], ranks_P, top.indices, top.values


def widened(raw_PV: torch.Tensor, num_ids: int) -> torch.Tensor:
    """Return log-probabilities of at least `num_ids` ids: where an adapter is not applied, its own ids are -inf."""
    return F.pad(raw_PV, (0, max(0, num_ids - raw_PV.shape[1])), value=-torch.inf)


def _num_candidates(options: SamplingOptions) -> int:
    return len(options.logprob_token_ids) or options.logprobs or 0


def _put_named(
    raw_PV: torch.Tensor, wanted: Sequence[SamplingOptions], ids_PK: torch.Tensor, values_PK: torch.Tensor
) -> None:
    """Replace the best candidates by those that a row's request names, if it does, best first."""
    raw_PV = widened(raw_PV, 1 + max((max(options.logprob_token_ids, default=0) for options in wanted), default=0))
    for row, options in enumerate(wanted):
        if options.logprob_token_ids:
            named = send(torch.tensor(options.logprob_token_ids), raw_PV.device)
            values, order = raw_PV[row, named].sort(descending=True, stable=True)
            ids_PK[row, : len(named)] = named[order]
            values_PK[row, : len(named)] = values
