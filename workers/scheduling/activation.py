"""Where an activated adapter (aLoRA, Greenewald et al. 2025) begins in a prompt: what comes before is the base model's.

As in PEFT it begins with the first token of the last occurrence of its invocation tokens, and goes on to the end of the
output. Only the prompt is searched, not what is generated, so the place is fixed when a request comes.
"""

from __future__ import annotations

from collections.abc import Sequence


def find_start(prompt_token_ids: Sequence[int], invocation_tokens: Sequence[int]) -> int | None:
    """Where the last occurrence begins; None: there is none, and the adapter is not applied at all."""
    first, num_tokens = invocation_tokens[0], len(invocation_tokens)
    for start in range(len(prompt_token_ids) - num_tokens, -1, -1):
        if prompt_token_ids[start] == first and all(
            prompt_token_ids[start + i] == invocation_tokens[i] for i in range(1, num_tokens)
        ):
            return start
    return None
