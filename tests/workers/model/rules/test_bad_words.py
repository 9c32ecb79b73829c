"""bad_words against transformers, which takes prompt and output for one text: here the output alone counts."""

from __future__ import annotations

import random

import pytest
import torch
from logit_rules import VOCAB, changed, make_request
from transformers import NoBadWordsLogitsProcessor

from lorafleet.workers.model.rules.bad_words import ForbiddenWords
from lorafleet.workers.model.rules.rule import History


@pytest.mark.parametrize("seed", range(20))
def test_the_last_token_of_a_word_is_forbidden_where_the_output_ends_with_the_others(seed: int) -> None:
    rng = random.Random(seed)
    words = [tuple(rng.randrange(4) for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 12))]
    output = [rng.randrange(4) for _ in range(rng.randrange(1, 12))]
    request, logits = make_request((0, 1, 2, 3), output, bad_words=tuple(words)), torch.randn(1, VOCAB)
    processor = NoBadWordsLogitsProcessor([list(word) for word in words])
    wanted = processor(torch.tensor([output]), logits.clone())
    assert torch.equal(changed(ForbiddenWords(), logits, [request]), wanted)


def test_the_prompt_begins_no_word() -> None:
    rule, request = ForbiddenWords(), make_request((1, 2), bad_words=((1, 2, 3), (2, 5), (7,)))
    logits = torch.zeros(1, VOCAB)
    assert (changed(rule, logits, [request]) == -torch.inf).nonzero().tolist() == [[0, 7]]
    request.token_ids.append(2)
    assert (changed(rule, logits, [request]) == -torch.inf).nonzero().tolist() == [[0, 5], [0, 7]]


def test_only_words_of_several_tokens_need_the_tokens_before() -> None:
    rule = ForbiddenWords()
    assert rule.history(make_request().sampling) is None
    assert rule.history(make_request(bad_words=((1,), (2,))).sampling) is History.LENGTH
    assert rule.history(make_request(bad_words=((1,), (2, 3))).sampling) is History.KNOWN
