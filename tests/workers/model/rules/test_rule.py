"""The seam as a rule sees it: its calls in a step, masks, errors, rows of others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from lorafleet.workers.errors import InternalError, InvalidRequestError
from lorafleet.workers.model.rules.changes import Changes
from lorafleet.workers.model.rules.rule import History, LogitRule, Row
from lorafleet.workers.model.sampling import Sampler
from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

VOCAB = 70
CPU = torch.device("cpu")


def request(top_k: int = 0, output: tuple[int, ...] = (), num_pending: int = 0) -> Request:
    sampling = SamplingOptions(max_tokens=100, temperature=0.0, top_k=top_k)
    made = Request.from_generate(GenerateRequest("r", (3, 4), sampling, output_token_ids=output), 0)
    made.num_pending_tokens = num_pending
    return made


class Spy(LogitRule):
    """Concerns rows with top_k, a free option of greedy rows, and allows them one token: top_k."""

    def __init__(self, history: History) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self._history = history

    def history(self, sampling: SamplingOptions) -> History | None:
        return self._history if sampling.top_k else None

    def prepare(self, rows: Sequence[Row]) -> None:
        self.calls.append(("prepare", [row.number for row in rows]))

    def write(self, rows: Sequence[Row], changes: Changes) -> None:
        self.calls.append(("write", [row.number for row in rows]))
        words = np.zeros((len(rows), 3), np.uint32)
        for own, (_, asked) in zip(words, rows, strict=True):
            own[asked.sampling.top_k // 32] = 1 << asked.sampling.top_k % 32
        changes.allow([row.number for row in rows], torch.from_numpy(words.view(np.int32)))

    def sampled(self, rows: Sequence[Row], token_ids_S: torch.Tensor) -> None:
        self.calls.append(("sampled", [int(token_ids_S[row.number]) for row in rows]))


def test_each_step_has_three_calls_with_the_rows_that_a_rule_concerns() -> None:
    spy, logits = Spy(History.KNOWN), torch.randn(4, VOCAB)
    sampler, batch = Sampler([spy]), [request(), request(top_k=31), request(), request(top_k=32)]
    assert sampler.prepare(batch, CPU)
    tokens = [sampled.token_id for sampled in sampler.sample(logits, batch).results()]
    assert tokens == [int(logits[0].argmax()), 31, int(logits[2].argmax()), 32]
    assert spy.calls == [("prepare", [1, 3]), ("write", [1, 3]), ("sampled", [31, 32])]


def test_a_rule_that_concerns_no_row_is_not_called() -> None:
    spy, batch = Spy(History.KNOWN), [request(num_pending=1)]
    sampler = Sampler([spy])
    assert sampler.prepare(batch, CPU), "and nothing waits for it"
    sampler.sample(torch.randn(1, VOCAB), batch)
    assert spy.calls == []


@pytest.mark.parametrize(
    ("history", "waits"), [(History.LENGTH, False), (History.SAMPLED, False), (History.KNOWN, True)]
)
def test_a_step_waits_for_pending_tokens_only_if_a_rule_must_know_them(history: History, waits: bool) -> None:
    spy = Spy(history)
    batch = [request(num_pending=1), request(top_k=5, output=(0,), num_pending=1)]
    assert Sampler([spy]).prepare(batch, CPU) is not waits
    assert bool(spy.calls) is not waits


class Fixed(LogitRule):
    """Gives the first row what it is told."""

    def __init__(self, error: InternalError | None = None, forbidden: Sequence[int] = ()) -> None:
        self._error = error
        self._forbidden = np.array(forbidden)

    def history(self, sampling: SamplingOptions) -> History | None:
        return History.LENGTH

    def write(self, rows: Sequence[Row], changes: Changes) -> None:
        if self._error is not None:
            changes.fail(0, self._error)
        if len(self._forbidden):
            changes.add(0, self._forbidden, np.full(len(self._forbidden), -np.inf, np.float32))


def test_an_error_of_a_rule_ends_its_row_alone() -> None:
    error, logits = InternalError("no"), torch.randn(2, VOCAB)
    sampler, batch = Sampler([Fixed(error)]), [request(), request()]
    assert sampler.prepare(batch, CPU)
    first, second = sampler.sample(logits, batch).results()
    assert first.error is error
    assert second.error is None and second.token_id == logits[1].argmax()


def test_a_row_with_no_token_left_ends_with_an_error_that_says_so() -> None:
    logits = torch.randn(2, VOCAB)
    sampler, batch = Sampler([Fixed(forbidden=[9]), Spy(History.LENGTH)]), [request(top_k=9), request(top_k=9)]
    assert sampler.prepare(batch, CPU)
    first, second = sampler.sample(logits, batch).results()
    assert isinstance(first.error, InvalidRequestError) and "No token is left" in first.error.message
    assert first.is_finite and second.error is None and second.token_id == 9
