"""min_tokens against transformers."""

from __future__ import annotations

import pytest
import torch
from logit_rules import VOCAB, changed, make_request
from transformers import MinNewTokensLengthLogitsProcessor

from lorafleet.workers.model.rules.min_tokens import MinTokens


@pytest.mark.parametrize("num_output", [0, 1, 2, 3, 4])
def test_nothing_ends_the_output_before_min_tokens(num_output: int) -> None:
    logits = torch.randn(1, VOCAB)
    request = make_request((1, 2), range(num_output), min_tokens=3, stop_token_ids=frozenset({9, 40}))
    wanted = MinNewTokensLengthLogitsProcessor(2, 3, [5, 9, 40])(torch.tensor([request.token_ids]), logits.clone())
    assert torch.equal(changed(MinTokens(frozenset({5})), logits, [request]), wanted)


def test_an_eos_that_is_ignored_may_come_early() -> None:
    logits, rule = torch.zeros(2, VOCAB), MinTokens(frozenset({5}))
    requests = [make_request(min_tokens=3, ignore_eos=True, stop_token_ids=frozenset({9})), make_request()]
    assert (changed(rule, logits, requests) == -torch.inf).nonzero().tolist() == [[0, 9]]


def test_it_need_not_know_the_tokens() -> None:
    """The last one may be pending: their number counts."""
    rule, request = MinTokens(frozenset({5})), make_request((1,), (2, 0), min_tokens=2)
    request.num_pending_tokens = 1
    assert not changed(rule, torch.zeros(1, VOCAB), [request]).any()
