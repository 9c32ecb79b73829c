"""All rules that need nothing but a request's own options and tokens."""

from __future__ import annotations

import torch

from lorafleet.workers.model.rules.allowed_token_ids import AllowedTokenIds
from lorafleet.workers.model.rules.bad_words import ForbiddenWords
from lorafleet.workers.model.rules.logit_bias import LogitBias
from lorafleet.workers.model.rules.min_tokens import MinTokens
from lorafleet.workers.model.rules.penalties import TokenPenalties
from lorafleet.workers.model.rules.rule import LogitRule


def option_rules(eos_token_ids: frozenset[int], device: torch.device) -> list[LogitRule]:
    """Return the rules for one sampler. eos_token_ids: the model's."""
    return [LogitBias(), AllowedTokenIds(), ForbiddenWords(), MinTokens(eos_token_ids), TokenPenalties(device)]
