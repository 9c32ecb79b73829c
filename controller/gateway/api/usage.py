"""`usage`: the tokens of an answer, as OpenAI counts them."""

from __future__ import annotations

from typing import Any

from lorafleet.controller.gateway.streams.generation import Generation


def usage_of(generation: Generation) -> dict[str, Any]:
    """Return the counts over all prompts and choices. EOS counts."""
    return usage(generation.num_prompt_tokens, generation.num_output_tokens, generation.num_cached_tokens)


def usage(num_prompt: int, num_output: int, num_cached: int) -> dict[str, Any]:
    """Return the counts. num_cached: of the prompts' tokens, those that were not computed."""
    return {
        "prompt_tokens": num_prompt,
        "total_tokens": num_prompt + num_output,
        "completion_tokens": num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
