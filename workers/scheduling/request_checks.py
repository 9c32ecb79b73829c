"""Checks that a request can be computed at all, made before it is accepted.

Owns: the rules. Leaves to others: a GenerateRequest's own checks (request.py), whether there is room for one more
(engine/loop.py, turns.py).
"""

from __future__ import annotations

from collections.abc import Callable

from lorafleet.workers.errors import AdapterRefusedError, ContextLengthError, InvalidRequestError, quoted
from lorafleet.workers.scheduling.request import MAX_COMPOSED, GenerateRequest


class RequestChecks:
    """The checks of one engine. Thread-safe."""

    def __init__(
        self,
        *,
        max_model_len: int,
        max_loras: int,
        vocab_size_of: Callable[[str | None], int],
        not_composable: Callable[[str], str],
    ) -> None:
        """vocab_size_of: by adapter, None for the base model. not_composable: an adapter's parts that cannot be summed.

        Both raise `AdapterUnavailableError` for an adapter that is not registered.
        """
        self._max_model_len = max_model_len
        self._max_composed = min(MAX_COMPOSED, max_loras)
        self._vocab_size_of = vocab_size_of
        self._not_composable = not_composable

    def check(self, request: GenerateRequest) -> None:
        """Raises `InvalidRequestError`, `ContextLengthError`, `AdapterRefusedError`, `AdapterUnavailableError`."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        if not prompt:
            raise InvalidRequestError("The prompt is empty; give at least one token.", param="prompt")
        if len(prompt) + sampling.max_tokens > self._max_model_len:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}: over the context of "
                f"{self._max_model_len} tokens.",
                param="max_tokens",
            )
        self._check_composition(request)
        vocab_size = self._vocab_size_of(request.adapter)
        for what, ids in (
            ("The prompt", prompt),
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
            ("allowed_token_ids", sampling.allowed_token_ids),
            ("bad_words", [token_id for word in sampling.bad_words for token_id in word]),
            ("output_token_ids", request.output_token_ids),
        ):
            low, high = min(ids, default=0), max(ids, default=0)
            if low < 0 or high >= vocab_size:
                raise InvalidRequestError(
                    f"{what} has the token id {quoted(low if low < 0 else high)}; ids go from 0 to {vocab_size - 1}.",
                    param="prompt" if ids is prompt else what,
                )

    def _check_composition(self, request: GenerateRequest) -> None:
        """Check that adapters of a composition have only LoRA on linears: other parts have no weighted sum."""
        if len(request.composition) > self._max_composed:
            raise InvalidRequestError(
                f"{len(request.composition)} adapters are named; at most {self._max_composed} may be.", param="adapters"
            )
        for digest, _ in request.composition:
            if has := self._not_composable(digest):
                raise AdapterRefusedError(
                    f"Adapter {digest} has {has}; with a weight or with others only LoRA on linears is applied.",
                    reason="not_composable",
                    param="adapters",
                )
