"""Sampling: logits to tokens, for the whole batch at once.

A row's token depends on its logits, its options and its own counter-based random number, never on its neighbours. One
kernel picks the tokens of all rows (kernels/sampling.py). This file prepares the kernel's columns of options and has
the rules (rules/rule.py) change the logits of the rows that they concern. On a GPU nothing here waits for the device
except `PendingSamples.results`.

S rows that sample, V vocabulary, P rows with log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from lorafleet.kernels.sampling import sample_changed_tokens, sample_tokens
from lorafleet.workers.errors import InvalidRequestError, LoRAFleetError
from lorafleet.workers.model.rules.changes import Changes
from lorafleet.workers.model.rules.rule import History, LogitRule, Row
from lorafleet.workers.model.transfer import Fetched, send
from lorafleet.workers.scheduling.logprobs import TokenLogprobs
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

_NOTHING_LEFT = (
    "No token is left to choose from: what the request forbids and what it allows (logit_bias, allowed_token_ids, "
    "bad_words, min_tokens, a grammar) exclude them all. Forbid less."
)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The result of one row."""

    token_id: int
    logprobs: TokenLogprobs | None
    is_finite: bool  # False: the logits hold NaN or +inf, the token means nothing
    error: LoRAFleetError | None = None  # a rule's: there is no token

    @property
    def is_usable(self) -> bool:
        """Return whether there is a token."""
        return self.is_finite and self.error is None


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
    rules: list[tuple[LogitRule, list[Row]]]  # that concern any row
    known: list[Request]  # whose tokens some rule must know
    logged: list[int]  # rows that want log-probabilities

    @classmethod
    def gather(cls, requests: Sequence[Request], rules: Sequence[LogitRule], device: torch.device) -> _Batch:
        options = [request.sampling for request in requests]

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return send(torch.tensor(values, dtype=dtype), device)

        temperatures = [option.temperature for option in options]
        concerned: list[tuple[LogitRule, list[Row]]] = []
        known: dict[Request, None] = {}
        for rule in rules:
            histories = [rule.history(option) for option in options]
            rows = [Row(i, requests[i]) for i, history in enumerate(histories) if history is not None]
            if rows:
                concerned.append((rule, rows))
            known |= dict.fromkeys(row.request for row in rows if histories[row.number] is History.KNOWN)
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
            rules=concerned,
            known=list(known),
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
        *,
        possible_S: torch.Tensor | None = None,
        errors: Mapping[int, LoRAFleetError] | None = None,
        logged: Sequence[int] = (),
        wanted: Sequence[SamplingOptions] = (),
        logprobs: tuple[torch.Tensor, ...] = (),
    ) -> None:
        """token_ids_S: int64, on the device. possible_S: false where rules left no token. errors: the rules', by row.
        logged: rows with log-probabilities; wanted: the options of each."""
        self.token_ids_S = token_ids_S
        self._errors = errors or {}
        self._logged = logged
        self._wanted = wanted
        self._fetched = Fetched((token_ids_S, finite_S, finite_S if possible_S is None else possible_S, *logprobs))

    def results(self) -> list[Sampled]:
        """Return one result per row. Waits for the device."""
        token_ids_S, finite_S, possible_S, *of_logged = (tensor.tolist() for tensor in self._fetched.tensors())
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids_S)
        for i, options, chosen, rank, ids, values in zip(self._logged, self._wanted, *of_logged, strict=True):
            count = _num_candidates(options)
            logprobs[i] = TokenLogprobs(chosen, rank, tuple(ids[:count]), tuple(values[:count]))
        results = list(map(Sampled, token_ids_S, logprobs, finite_S))
        if not self._errors and all(possible_S):
            return results
        for i, result in enumerate(results):
            error = self._errors.get(i)
            if error is None and result.is_finite and not possible_S[i]:
                error = InvalidRequestError(_NOTHING_LEFT)
            results[i] = replace(result, error=error)
        return results


class Sampler:
    """Picks the tokens of successive batches."""

    def __init__(self, rules: Sequence[LogitRule]) -> None:
        """rules: all that may change logits. Their order does not matter."""
        self._rules = list(rules)
        self._batch: _Batch | None = None  # the last batch

    def prepare(self, requests: list[Request], device: torch.device) -> bool:
        """Let rules begin the step's work, unless one must know a token that is pending; return whether none must."""
        batch = self._gather(requests, device)
        if any(request.num_pending_tokens for request in batch.known):
            return False
        for rule, rows in batch.rules:
            rule.prepare(rows)
        return True

    def sample(self, logits_SV: torch.Tensor, requests: list[Request]) -> PendingSamples:
        """Pick one token per row, after `prepare` returned true. `logits_SV` has the model's dtype and is not changed.

        Log-probabilities are those of the original logits.
        """
        batch = self._gather(requests, logits_SV.device)
        columns = (batch.temperature_S, batch.top_k_S, batch.top_p_S, batch.min_p_S, batch.uniform_S())
        changes = Changes(logits_SV.shape[1], logits_SV.device)
        for rule, rows in batch.rules:
            rule.write(rows, changes)
        gathered = changes.gather()
        possible_S: torch.Tensor | None = None
        if gathered is None:
            token_ids_S, finite_S = sample_tokens(logits_SV, *columns)
        else:
            token_ids_S, finite_S, possible_S = sample_changed_tokens(logits_SV, *columns, gathered)
        for rule, rows in batch.rules:
            rule.sampled(rows, token_ids_S)
        wanted = [requests[i].sampling for i in batch.logged]
        logprobs: tuple[torch.Tensor, ...] = ()
        if wanted:
            rows_P = send(torch.tensor(batch.logged), logits_SV.device)
            raw_PV = logits_SV[rows_P].float().log_softmax(dim=1)
            logprobs = logprobs_of(raw_PV, token_ids_S[rows_P], max(map(_num_candidates, wanted)))
            _put_named(raw_PV, wanted, *logprobs[2:])
        return PendingSamples(
            token_ids_S,
            finite_S,
            possible_S=possible_S,
            errors=changes.errors,
            logged=batch.logged,
            wanted=wanted,
            logprobs=logprobs,
        )

    def _gather(self, requests: list[Request], device: torch.device) -> _Batch:
        batch = self._batch
        if batch is None or batch.requests != requests:  # compares identities
            batch = self._batch = _Batch.gather(requests, self._rules, device)
        return batch


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
