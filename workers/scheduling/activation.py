"""The start of an activated adapter (aLoRA, Greenewald et al. 2025) in a prompt. Tokens before it use the base model.

As in PEFT, the adapter applies from the first token of the last occurrence of its invocation tokens to the end of the
output. Only the prompt is searched, not the output, so the start is fixed when a request arrives.
"""

from __future__ import annotations

from collections.abc import Sequence


def find_start(prompt_token_ids: Sequence[int], invocation_tokens: Sequence[int]) -> int | None:
    """Return the start of the last occurrence; None if there is none, and the adapter is not applied at all."""
    first, num_tokens = invocation_tokens[0], len(invocation_tokens)
    for start in range(len(prompt_token_ids) - num_tokens, -1, -1):
        if prompt_token_ids[start] == first and all(
            prompt_token_ids[start + i] == invocation_tokens[i] for i in range(1, num_tokens)
        ):
            return start
    return None
