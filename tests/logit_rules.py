"""What tests of logit rules share: requests with options, and the logits that a rule leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorafleet.kernels.logit_changes import change_logits_
from lorafleet.workers.model.rules.changes import Changes
from lorafleet.workers.model.rules.rule import LogitRule, Row
from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

VOCAB = 70


def make_request(prompt: Sequence[int] = (3, 4), output: Sequence[int] = (), **options: Any) -> Request:
    sampling = SamplingOptions(max_tokens=200, **options)
    return Request.from_generate(GenerateRequest("r", tuple(prompt), sampling, output_token_ids=tuple(output)), 0)


def changed(rule: LogitRule, logits_SV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Return the logits as the rule leaves them, in float32."""
    rows = [Row(i, request) for i, request in enumerate(requests) if rule.history(request.sampling) is not None]
    changes = Changes(logits_SV.shape[1], logits_SV.device)
    if rows:
        rule.prepare(rows)
        rule.write(rows, changes)
    gathered = changes.gather()
    logits_SV = logits_SV.float().clone()
    if gathered is not None:
        own = logits_SV[gathered.row_P]
        change_logits_(own, gathered)
        logits_SV[gathered.row_P] = own
    return logits_SV


def give(rule: LogitRule, requests: Sequence[Request], token_ids: Sequence[int]) -> None:
    """Give each request a token, as a step does."""
    rule.sampled([Row(i, request) for i, request in enumerate(requests)], torch.tensor(token_ids))
    for request, token_id in zip(requests, token_ids, strict=True):
        request.token_ids.append(token_id)
