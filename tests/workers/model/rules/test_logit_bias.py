"""logit_bias against transformers."""

from __future__ import annotations

import torch
from logit_rules import VOCAB, changed, make_request
from transformers import SequenceBiasLogitsProcessor

from lorafleet.workers.model.rules.logit_bias import LogitBias


def test_values_are_added_to_the_rows_own_logits() -> None:
    logits = torch.randn(3, VOCAB)
    bias = {0: 2.5, 7: -100.0, VOCAB - 1: 100.0}
    requests = [make_request(), make_request(logit_bias=tuple(bias.items())), make_request(logit_bias=((1, -1.0),))]
    wanted = logits.clone()
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    wanted[1:2] = processor(torch.tensor([requests[1].token_ids]), logits[1:2])
    wanted[2, 1] -= 1.0
    rule = LogitBias()
    for _ in range(2):
        torch.testing.assert_close(changed(rule, logits, requests), wanted)
