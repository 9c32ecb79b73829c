"""Rules of a request about single tokens: logit_bias, allowed_token_ids, bad_words, as the engine has them.

Owns: their forms and limits. Leaves to others: callers' forms (workers/params.py), the row's vocabulary
(request_checks.py), applying them (workers/model/rules/). Standard library only.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from lorafleet.workers.errors import InvalidRequestError, quoted

TokenBias = tuple[tuple[int, float], ...]  # (token id, what is added to its logit), no token twice
BadWords = tuple[tuple[int, ...], ...]  # token ids: the last is forbidden where the output ends with the others

MAX_BIAS: Final = 100.0
MAX_BIASED: Final = 1024
MAX_ALLOWED: Final = 1 << 14
MAX_BAD_WORDS: Final = 256
MAX_BAD_WORD_CHARS: Final = 256
MAX_BAD_WORD_FORMS: Final = 2 * MAX_BAD_WORDS  # each with and without a space before it
MAX_BAD_WORD_TOKENS: Final = 4 * (1 + MAX_BAD_WORD_CHARS)  # a token for each byte


def check_logit_bias(bias: TokenBias) -> None:
    """Raises `InvalidRequestError` for too many tokens or a value out of range."""
    check_count("logit_bias", bias, MAX_BIASED)
    for token_id, value in bias:
        if not abs(value) <= MAX_BIAS:  # false for NaN too
            raise InvalidRequestError(
                f"logit_bias of the token id {quoted(token_id)} is {quoted(value)}; it must be between {-MAX_BIAS:g} "
                f"and {MAX_BIAS:g}.",
                param="logit_bias",
            )


def check_bad_words(words: BadWords) -> None:
    """Raises `InvalidRequestError` for too many or too long words, or one without tokens."""
    check_count("bad_words", words, MAX_BAD_WORD_FORMS)
    for word in words:
        if not 0 < len(word) <= MAX_BAD_WORD_TOKENS:
            raise InvalidRequestError(
                f"bad_words has a word of {len(word)} tokens; give 1 to {MAX_BAD_WORD_TOKENS}.", param="bad_words"
            )


def check_count(name: str, entries: Collection[object], limit: int) -> None:
    """Raises `InvalidRequestError` for more entries than the limit."""
    if len(entries) > limit:
        raise InvalidRequestError(f"{name} has {len(entries)} entries; the limit is {limit}.", param=name)
