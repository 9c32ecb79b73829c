"""Fields of answers that clients read as attributes, whether or not anything fills them: null then.

Owns: their names, as OpenAI and vLLM have them. Leaves to others: values (chat.py, completions.py, answer.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

CHAT_ANSWER: Final = ("service_tier", "system_fingerprint", "prompt_logprobs", "prompt_token_ids", "kv_transfer_params")
CHAT_CHOICE: Final = ("logprobs", "finish_reason", "stop_reason", "token_ids")
CHAT_MESSAGE: Final = (
    "content",
    "refusal",
    "annotations",
    "audio",
    "function_call",
    "tool_calls",
    "reasoning",
    "reasoning_content",
)

COMPLETION_ANSWER: Final = ("service_tier", "system_fingerprint", "kv_transfer_params")
COMPLETION_CHOICE: Final = (
    "logprobs",
    "finish_reason",
    "stop_reason",
    "token_ids",
    "prompt_logprobs",
    "prompt_token_ids",
)

CHUNK: Final = ("system_fingerprint", "prompt_token_ids")
CHUNK_CHOICE: Final = ("stop_reason", "token_ids")


def with_nulls(fields: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the fields, and null for each of `names` that is not among them."""
    return {**fields, **{name: None for name in names if name not in fields}}
