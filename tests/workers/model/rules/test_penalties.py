"""Penalties against transformers and their definition, counted token by token, on the host and in a table."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from logit_rules import VOCAB, changed, give, make_request
from transformers import RepetitionPenaltyLogitsProcessor

from lorafleet.workers.model.rules.penalties import TokenPenalties, _DeviceCounts
from lorafleet.workers.scheduling.request import Request

CPU = torch.device("cpu")


def make_rule(where: str) -> TokenPenalties:
    rule = TokenPenalties(CPU)
    if where == "table":
        rule._counts = _DeviceCounts(CPU)
    return rule


both = pytest.mark.parametrize("where", ["lists", "table"])


@both
def test_the_repetition_penalty_is_transformers(where: str) -> None:
    logits, request = torch.randn(1, VOCAB), make_request((1, 2, 2, 9), (5, 9, 60), repetition_penalty=1.4)
    wanted = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([request.token_ids]), logits.clone())
    torch.testing.assert_close(changed(make_rule(where), logits, [request]), wanted)


@both
def test_presence_and_frequency_count_the_output_alone(where: str) -> None:
    logits, output = torch.randn(1, VOCAB), (5, 9, 5, 5)
    request = make_request((1, 5, 7), output, presence_penalty=0.75, frequency_penalty=-0.5)
    wanted = logits.clone()
    for token, count in Counter(output).items():
        wanted[0, token] -= 0.75 - 0.5 * count
    torch.testing.assert_close(changed(make_rule(where), logits, [request]), wanted)


@both
def test_counts_kept_step_by_step_are_those_of_a_rule_that_counts_anew(where: str) -> None:
    """Also for requests that pause, come back, start late or are in the batch in another order."""
    torch.manual_seed(1)
    requests = [
        make_request((1, 2, 3), repetition_penalty=1.3),
        make_request((4, 5), frequency_penalty=0.4),
        make_request((4, 9), (6, 6, 8), presence_penalty=-0.4, repetition_penalty=0.8),
    ]
    rule, late = make_rule(where), make_request((7, 7), presence_penalty=1.0)
    for step in range(60):
        batch = [requests[step % 3], requests[(step + 1) % 3], *([late] if step > 20 else [])]
        logits = torch.randn(len(batch), VOCAB)
        kept = changed(rule, logits, batch)
        torch.testing.assert_close(kept, changed(make_rule(where), logits, batch), rtol=0, atol=0)
        give(rule, batch, torch.randint(VOCAB, (len(batch),)).tolist())


@both
def test_ids_beyond_the_base_models(where: str) -> None:
    """A step is as wide as its widest adapter. A prompt may have wider ids, if its adapter did not begin."""
    rule = make_rule(where)
    own, foreign = (make_request((1, VOCAB + more), repetition_penalty=2.0) for more in (2, 20))
    for width in (VOCAB + 3, VOCAB + 9, VOCAB + 3):
        halved = (changed(rule, torch.ones(2, width), [own, foreign]) == 0.5).nonzero().tolist()
        assert halved == [[0, 1], [0, VOCAB + 2], [1, 1]]
        give(rule, [own, foreign], [1, 1])


def test_rows_of_the_table_are_used_again_and_begin_empty() -> None:
    rule = make_rule("table")
    for _ in range(5):
        requests: list[Request] = [make_request((1, 2), presence_penalty=1.0, seed=i) for i in range(8)]
        logits = torch.zeros(8, VOCAB)
        assert not changed(rule, logits, requests).any()
        give(rule, requests, range(8))
        assert changed(rule, logits, requests).nonzero().tolist() == [[i, i] for i in range(8)]
        del requests
        gc.collect()
    assert isinstance(rule._counts, _DeviceCounts) and len(rule._counts._codes_KV) == 8


def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    rule = make_rule("lists")
    requests = [make_request(presence_penalty=1.0) for _ in range(3)]
    changed(rule, torch.zeros(3, VOCAB), requests)
    requests.clear()
    gc.collect()
    assert not rule._num_counted and not rule._counts._lists  # type: ignore[attr-defined]
