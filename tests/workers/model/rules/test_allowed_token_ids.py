"""allowed_token_ids, at the edges of words."""

from __future__ import annotations

import pytest
import torch
from logit_rules import VOCAB, changed, make_request

from lorafleet.workers.model.rules.allowed_token_ids import AllowedTokenIds


@pytest.mark.parametrize("allowed", [{0}, {31}, {32}, {0, 31, 32, 63, 64, 69}, set(range(VOCAB)), {5, 1000}])
def test_no_other_token_is_left(allowed: set[int]) -> None:
    logits = torch.randn(2, VOCAB)
    plain, limited = changed(
        AllowedTokenIds(), logits, [make_request(), make_request(allowed_token_ids=frozenset(allowed))]
    )
    assert torch.equal(plain, logits[0])
    for token in range(VOCAB):
        assert limited[token] == (logits[1, token] if token in allowed else -torch.inf)
