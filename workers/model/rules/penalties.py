"""Penalties on tokens that a request's prompt or output has already.

Counts are kept up to date token by token: on the host in a list of the tokens seen, on a GPU in a table of all tokens,
where the last token need not be known to the host.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from lorafleet.kernels.logit_changes import Seen
from lorafleet.kernels.seen_tokens import add_sampled_, seen_tokens, token_codes
from lorafleet.workers.model.rules.changes import Changes
from lorafleet.workers.model.rules.rule import History, LogitRule, Row
from lorafleet.workers.model.transfer import send
from lorafleet.workers.scheduling.request import Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions


class TokenPenalties(LogitRule):
    """The repetition penalty over prompt and output, frequency and presence penalties over output."""

    def __init__(self, device: torch.device) -> None:
        self._counts: _Counts = _HostCounts() if device.type == "cpu" else _DeviceCounts(device)
        self._num_counted: WeakKeyDictionary[Request, int] = WeakKeyDictionary()  # tokens

    def history(self, sampling: SamplingOptions) -> History | None:
        factors = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        return None if factors == (1.0, 0.0, 0.0) else History.SAMPLED

    def write(self, rows: Sequence[Row], changes: Changes) -> None:
        for _, request in rows:
            if self._num_counted.get(request) != request.num_tokens:
                assert not request.num_pending_tokens, "counted before, and in `sampled`"
                self._counts.count(request)
                self._num_counted[request] = request.num_tokens
        options = [request.sampling for _, request in rows]
        factors = [(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in options]
        seen = self._counts.seen([request for _, request in rows], changes.vocab_size)
        changes.penalise([row for row, _ in rows], torch.tensor(factors, dtype=torch.float32), seen)

    def sampled(self, rows: Sequence[Row], token_ids_S: torch.Tensor) -> None:
        for _, request in rows:
            self._num_counted[request] += 1
        self._counts.add(rows, token_ids_S)


class _Counts(Protocol):
    def count(self, request: Request) -> None:
        """Count a request's tokens."""

    def seen(self, requests: Sequence[Request], vocab_size: int) -> Seen:
        """Return counted requests' tokens."""

    def add(self, rows: Sequence[Row], token_ids_S: torch.Tensor) -> None:
        """Count each row's next token."""


class _HostCounts:
    """A list of tokens a request."""

    def __init__(self) -> None:
        self._lists: WeakKeyDictionary[Request, torch.Tensor] = WeakKeyDictionary()

    def count(self, request: Request) -> None:
        num_left = max(1, request.sampling.max_tokens - request.num_output_tokens)
        self._lists[request] = seen_tokens(request.token_ids, request.num_prompt_tokens, num_left)

    def seen(self, requests: Sequence[Request], vocab_size: int) -> Seen:
        return [self._lists[request] for request in requests]

    def add(self, rows: Sequence[Row], token_ids_S: torch.Tensor) -> None:
        row_R = torch.tensor([row for row, _ in rows], dtype=torch.int64)
        add_sampled_([self._lists[request] for _, request in rows], row_R, token_ids_S)


class _DeviceCounts:
    """A table with a row for each request, of the codes of all tokens. Rows are used again when their requests end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._codes_KV = torch.empty(0, 0, dtype=torch.int32, device=device)
        self._free: list[int] = []
        self._row_of: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        self._to_count: list[Request] = []

    def count(self, request: Request) -> None:
        self._to_count.append(request)

    def seen(self, requests: Sequence[Request], vocab_size: int) -> Seen:
        self._widen(vocab_size)
        for request in self._to_count:
            self._fill(request)
        self._to_count.clear()
        row_R = send(torch.tensor([self._row_of[request] for request in requests]), self._device)
        return self._codes_KV[row_R, :vocab_size]

    def add(self, rows: Sequence[Row], token_ids_S: torch.Tensor) -> None:
        at = [[row for row, _ in rows], [self._row_of[request] for _, request in rows]]
        row_R, own_R = send(torch.tensor(at), self._device)
        self._codes_KV[own_R, token_ids_S[row_R]] += 2

    def _fill(self, request: Request) -> None:
        if request not in self._row_of:
            if not self._free:
                self._grow(max(8, 2 * len(self._codes_KV)), self._codes_KV.shape[1])
            self._row_of[request] = row = self._free.pop()
            weakref.finalize(request, self._free.append, row).atexit = False
        codes_V = self._codes_KV[self._row_of[request]].zero_()
        token_ids, codes = token_codes(request.token_ids, request.num_prompt_tokens)
        is_known = token_ids < len(codes_V)
        codes_V[send(token_ids[is_known], self._device)] = send(codes[is_known], self._device)

    def _widen(self, vocab_size: int) -> None:
        if vocab_size > self._codes_KV.shape[1]:
            self._grow(len(self._codes_KV), vocab_size)

    def _grow(self, num_rows: int, width: int) -> None:
        codes_KV = torch.zeros(num_rows, width, dtype=torch.int32, device=self._device)
        before, width_before = self._codes_KV.shape
        codes_KV[:before, :width_before] = self._codes_KV
        self._codes_KV = codes_KV
        self._free.extend(range(before, num_rows))
