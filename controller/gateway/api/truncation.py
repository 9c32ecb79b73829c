"""`truncate_prompt_tokens` and `truncation_side`: prompts cut to a number of tokens, as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lorafleet.controller.gateway.api.schema import GenerateFields
from lorafleet.workers.errors import InvalidRequestError, quoted

SIDES: Final = ("left", "right")
MAX_CONTEXTS: Final = 64  # that a prompt may have before it is cut


@dataclass(frozen=True, slots=True)
class Truncation:
    """A cut that keeps at most `num_tokens` of a prompt: its end, or its start."""

    num_tokens: int
    keeps_end: bool

    def of(self, token_ids: list[int]) -> list[int]:
        """Return what is kept of a prompt; one that is short enough itself."""
        if len(token_ids) <= self.num_tokens:
            return token_ids
        return token_ids[-self.num_tokens :] if self.keeps_end else token_ids[: self.num_tokens]


def truncation_of(fields: GenerateFields, max_tokens: int | None, max_model_len: int) -> Truncation | None:
    """Return a request's truncation; None: prompts are taken whole.

    -1 keeps as much as the context holds beside `max_tokens`. truncation_side: what is cut off; left by default.
    Raises InvalidRequestError.
    """
    num_tokens, side = fields.truncate_prompt_tokens, fields.truncation_side
    if side is not None and side not in SIDES:
        raise InvalidRequestError(
            f"truncation_side is {quoted(side)}; it must be left or right.", param="truncation_side"
        )
    if num_tokens is None:
        return None
    if num_tokens != -1 and not 1 <= num_tokens <= max_model_len:
        raise InvalidRequestError(
            f"truncate_prompt_tokens is {quoted(num_tokens)}; it must be between 1 and {max_model_len}, the context, "
            "or -1 for as much as it holds.",
            param="truncate_prompt_tokens",
        )
    if num_tokens == -1:
        num_tokens = max(1, max_model_len - (1 if max_tokens is None else max_tokens))
    return Truncation(num_tokens, side != "right")
