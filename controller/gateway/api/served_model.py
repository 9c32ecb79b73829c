"""The model of a request: an entry of the routing table, with its tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorafleet.controller.gateway.api.prompts import empty_prompt
from lorafleet.controller.gateway.routing.routing_table import ModelEntry
from lorafleet.workers.text.model_text import ModelText


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model of the routing table that was current when the request came."""

    entry: ModelEntry
    text: ModelText
    max_model_len: int

    def check_prompt(self, token_ids: Sequence[int], field: str) -> None:
        """Raises InvalidRequestError that names the field, for an empty prompt or an unknown token id."""
        if not token_ids:
            raise empty_prompt(field)
        self.text.tokenizer.check_ids(token_ids, self.entry.vocab_size, field)
