"""All rules together: each row has its own, in one batch."""

from __future__ import annotations

import torch
from logit_rules import VOCAB, make_request

from lorafleet.workers.model.rules.option_rules import option_rules
from lorafleet.workers.model.sampling import Sampler
from lorafleet.workers.scheduling.request import Request


def make_batch() -> list[Request]:
    return [
        make_request(temperature=0.0),
        make_request((1, 2, 3), temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25),
        make_request(temperature=0.0, logit_bias=((9, 3.0), (11, -100.0)), min_tokens=4, stop_token_ids=frozenset({9})),
        make_request(seed=3, allowed_token_ids=frozenset(range(0, VOCAB, 3)), bad_words=((3,), (6, 9), (9, 6))),
        make_request(seed=4, top_k=5, frequency_penalty=0.5, bad_words=((7, 8),)),
        make_request(seed=5),
    ]


def test_a_batch_gives_each_row_what_it_gets_alone() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(len(make_batch()), VOCAB) * 2 for _ in range(30)]

    def run(rows: list[int]) -> list[list[int]]:
        sampler, batch = Sampler(option_rules(frozenset({5}), torch.device("cpu"))), make_batch()
        requests = [batch[row] for row in rows]
        for step in logits:
            assert sampler.prepare(requests, torch.device("cpu"))
            for request, sampled in zip(requests, sampler.sample(step[rows], requests).results(), strict=True):
                assert sampled.error is None
                request.token_ids.append(sampled.token_id)
        return [request.token_ids[request.num_prompt_tokens :] for request in requests]

    together = run(list(range(len(make_batch()))))
    assert together == [run([row])[0] for row in range(len(together))]
    assert 9 not in together[2][:4] and 11 not in together[2]
    assert set(together[3]) <= set(range(0, VOCAB, 3)) - {3}
    pairs = set(zip(together[3], together[3][1:], strict=False))
    assert not pairs & {(6, 9), (9, 6)}
