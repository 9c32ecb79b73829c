"""The prompts of a completion, in their four forms.

Owns: reading them, refusing unusable ones before they are decoded, echo. Leaves to others: room for an answer
(workers/params.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from lorafleet.controller.gateway.api.body import decode_field
from lorafleet.workers.errors import ContextLengthError, InvalidRequestError
from lorafleet.workers.text.detokenizer import IncrementalDetokenizer
from lorafleet.workers.text.tokenizer import Tokenizer

MAX_PROMPTS: Final = 128
MAX_ECHO_CHARS: Final = 1 << 24  # of all choices

Prompt = str | list[int]
_LISTS = re.compile(rb"\[\s*\[")


def read_prompts(raw: bytes, max_num_ids: int) -> list[Prompt]:
    """Return texts, or lists of token ids. Raises InvalidRequestError for none, too many, an empty one, or mixed kinds,
    ContextLengthError for one of more than `max_num_ids`."""
    items: Any
    if _LISTS.match(raw):
        items = decode_field(raw, list[msgspec.Raw], "prompt")
        _check_num_prompts(items)
        return [_ids(bytes(item), f"prompt[{number}]", max_num_ids) for number, item in enumerate(items)]
    if raw[:1] == b"[" and b'"' not in raw and b"[" not in raw[1:]:
        return [_ids(raw, "prompt", max_num_ids)]
    items = decode_field(raw, str | list[str | int | list[int]], "prompt")
    texts = [items] if isinstance(items, str) else items
    _check_num_prompts(texts)
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(
            "prompt mixes kinds; give a string, strings, token ids, or lists of token ids.", param="prompt"
        )
    if not all(texts):
        raise empty_prompt("prompt")
    return list(texts)


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], add_special_tokens: bool, max_num_ids: int
) -> list[list[int]]:
    """Return each prompt's token ids. Raises ContextLengthError for a text that surely has more than `max_num_ids`."""
    return [
        tokenizer.encode(prompt, add_special_tokens, max_tokens=max_num_ids) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def echoes_of(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], n: int, *, skip_special_tokens: bool = True
) -> list[str]:
    """Return the prompt to echo in each choice. Raises InvalidRequestError if they exceed the limit.

    Ids that end inside a character are echoed without it: the answer's text begins with it.
    """
    texts = [
        prompt
        if isinstance(prompt, str)
        else IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens).push(prompt)
        for prompt in prompts
    ]
    check_echo(n * sum(map(len, texts)))
    return [text for text in texts for _ in range(n)]


def check_echo(num_chars: int) -> None:
    """Raises InvalidRequestError if all choices together would repeat too much. num_chars: of all."""
    if num_chars > MAX_ECHO_CHARS:
        raise InvalidRequestError(
            f"echo would repeat {num_chars} characters in all choices; the limit is {MAX_ECHO_CHARS}. Ask without it.",
            param="echo",
        )


def _ids(raw: bytes, name: str, max_num_ids: int) -> list[int]:
    num_ids = raw.count(b",") + 1
    if num_ids > max_num_ids:
        raise ContextLengthError.beyond(
            max_num_ids, f"{name} has {num_ids} token ids, which leaves no room for an answer. Shorten it."
        )
    ids: list[int] = decode_field(raw, list[int], name)
    if not ids:
        raise empty_prompt("prompt")
    return ids


def _check_num_prompts(items: Sequence[object]) -> None:
    if not items:
        raise empty_prompt("prompt")
    if len(items) > MAX_PROMPTS:
        raise InvalidRequestError(f"prompt has {len(items)} prompts, the limit is {MAX_PROMPTS}.", param="prompt")


def empty_prompt(field: str) -> InvalidRequestError:
    """Return the error for a prompt without tokens."""
    return InvalidRequestError(f"{field} is empty; there must be at least one token.", param=field)
