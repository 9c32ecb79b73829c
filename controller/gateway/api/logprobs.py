"""Log-probabilities in OpenAI's two shapes.

Owns: the shapes. Leaves to others: which tokens count (streams/generation.py).

A token that is only part of a character is written as escaped bytes, as OpenAI does.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Final, TypedDict

from lorafleet.workers.scheduling.request import TokenLogprobs
from lorafleet.workers.text.tokenizer import Tokenizer

LOWEST: Final = -9999.0
"""OpenAI's value for minus infinity, which JSON lacks."""


class ChatTop(TypedDict):
    """One candidate at one position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ChatTop):
    """One position of a chat answer."""

    top_logprobs: list[ChatTop]


class CompletionLogprobs(TypedDict):
    """All positions of a completion, in columns."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int
) -> list[ChatToken]:
    """Return `logprobs.content` of a chat choice. num_top: candidates at each position."""
    content = []
    for token_id, entry in zip(token_ids, logprobs, strict=False):
        top = zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False)
        one = _chat_top(tokenizer, token_id, entry.logprob)
        content.append(ChatToken(**one, top_logprobs=[_chat_top(tokenizer, *candidate) for candidate in top]))
    return content


def _chat_top(tokenizer: Tokenizer, token_id: int, logprob: float) -> ChatTop:
    data = tokenizer.token_bytes(token_id) or b""
    return ChatTop(token=_spell(data, ""), logprob=max(logprob, LOWEST), bytes=list(data))


class CompletionColumns:
    """The columns of one completion choice, which a stream sends in pieces.

    text_offset: the start of each token in the answer's text; a token that is not shown (EOS) has no length.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """Return the columns for the next tokens. The sampled token is always among the candidates."""
        columns = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for token_id, entry in zip(token_ids, logprobs, strict=False):
            data = self._tokenizer.token_bytes(token_id) or b""
            token = _spell(data, "bytes:")
            top = {
                _spell(self._tokenizer.token_bytes(candidate) or b"", "bytes:"): max(logprob, LOWEST)
                for candidate, logprob in zip(entry.top_ids, entry.top_logprobs, strict=False)
            }
            chosen = max(entry.logprob, LOWEST)
            top.setdefault(token, chosen)
            columns["text_offset"].append(self._offset)
            columns["token_logprobs"].append(chosen)
            columns["tokens"].append(token)
            columns["top_logprobs"].append(top)
            if token_id not in self._hidden:
                self._offset += len(self._decoder.decode(data))
        return columns


def _spell(data: bytes, prefix: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)
