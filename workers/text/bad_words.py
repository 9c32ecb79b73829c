"""bad_words: words that must not be generated, as sequences of token ids."""

from __future__ import annotations

from collections.abc import Sequence

from lorafleet.workers.scheduling.token_rules import BadWords
from lorafleet.workers.text.tokenizer import Tokenizer


def forbidden_sequences(tokenizer: Tokenizer, words: Sequence[str]) -> BadWords:
    """Return each word's tokens at the start of a text and after a space, where they differ.

    Spaces before a word do not count, as in vLLM; a word of nothing else is taken as it is.
    """
    forms = [form for word in words for form in _forms(word)]
    if not forms:
        return ()
    sequences = map(tuple, tokenizer.encode_batch(forms, add_special_tokens=False))
    return tuple(dict.fromkeys(sequence for sequence in sequences if sequence))


def _forms(word: str) -> tuple[str, ...]:
    bare = word.lstrip()
    return (bare, f" {bare}") if bare else (word,)
