"""`usage`: the tokens of an answer, as OpenAI counts them."""

from __future__ import annotations

from typing import Any

from lorafleet.controller.gateway.streams.generation import Generation


def usage_of(generation: Generation) -> dict[str, Any]:
    """Return the counts over all prompts and choices. EOS counts."""
    num_prompt, num_output = generation.num_prompt_tokens, generation.num_output_tokens
    return {
        "prompt_tokens": num_prompt,
        "total_tokens": num_prompt + num_output,
        "completion_tokens": num_output,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }
