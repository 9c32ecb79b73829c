"""Control tokens of a prompt: those that its template wrote, told from text of a request that only looks like one.

A tokenizer recognises a control token, such as ``<|im_end|>``, wherever its text stands. In a rendered prompt it must
not recognise one in text that a request chose. Such a prompt is encoded with a tokenizer of the same model and rules in
which each control token has another, secret text, which is put in where the template wrote the token. All other prompts
are encoded as they are.

Owns: finding control tokens, encoding a prompt whose content has some. Leaves to others: which characters are content
(traced_text.py).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Final

import tokenizers
from tokenizers import AddedToken

from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.text.traced_text import Spans, content_of

_COVER: Final = "\ue000"  # of private use: in no token's text
_BARRED: Final = re.compile(r"<[|｜].+[|｜]>")
_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor")


@dataclass(frozen=True, slots=True)
class _Found:
    """A control token in a text."""

    token_id: int
    start: int
    end: int


class ControlTokens:
    """The control tokens of one tokenizer. Immutable and thread-safe.

    A control token is an added token that is declared as special, ends an answer, or has bars, as ``<|user|>`` does,
    which some models fail to declare. Others, such as ``<think>``, may stand in any text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_ids: Container[int] = ()) -> None:
        added = backend.get_added_tokens_decoder()
        self._texts = {
            token_id: token.content
            for token_id, token in added.items()
            if token.special or token_id in eos_token_ids or _BARRED.fullmatch(token.content)
        }

        self._finder = tokenizers.Tokenizer(tokenizers.models.WordLevel({_COVER: 0}, unk_token=_COVER))
        if backend.normalizer is not None and any(token.normalized for token in added.values()):
            self._finder.normalizer = backend.normalizer
        self._finder.add_tokens(list(added.values()))
        self._finder_ids = {self._finder.token_to_id(text): token_id for token_id, text in self._texts.items()}

        secret = secrets.token_hex(8)
        self._secrets = {token_id: f"{_COVER}{secret}:{token_id}{_COVER}" for token_id in self._texts}
        self._hiding = tokenizers.Tokenizer(backend.model)  # shares the vocabulary and merges
        for part in _PARTS:
            if (value := getattr(backend, part)) is not None:
                setattr(self._hiding, part, value)
        hidden = {token_id: _renamed(token, self._secrets.get(token_id)) for token_id, token in added.items()}
        self._hiding.add_tokens(list(hidden.values()))
        self._hiding_ids = {self._hiding.token_to_id(token.content): token_id for token_id, token in hidden.items()}
        unknown = getattr(backend.model, "unk_token", None)  # what any odd character may become
        self._written_only = {token_id for token_id, text in self._texts.items() if text != unknown}

    def in_content(self, text: str) -> bool:
        """Return whether content changes which control tokens the tokenizer recognises."""
        content = content_of(text)
        if not content or not self._texts:
            return False
        encodings = self._finder.encode_batch_fast([text, _without(text, content)], add_special_tokens=False)
        found, own = ([token_id for token_id in encoding.ids if token_id in self._finder_ids] for encoding in encodings)
        return found != own

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Convert a prompt to ids, of which only the template's control tokens are ones.

        Raises InvalidRequestError if the tokenizer's model itself makes a control token of text.
        """
        content = content_of(text)
        own = _outside(content, self._find(_covered(text, content)))
        pieces: list[str] = []
        position = 0
        for found in own:
            pieces += [text[position : found.start], self._secrets[found.token_id]]
            position = found.end
        pieces.append(text[position:])
        (encoding,) = self._hiding.encode_batch_fast(["".join(pieces)], add_special_tokens=add_special_tokens)
        ids: list[int] = []
        control: list[int] = []
        for token_id, is_added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if not is_added:  # by the post-processor, with the id that it knows
                is_written = token_id in self._hiding_ids
                token_id = self._hiding_ids.get(token_id, token_id)
                if token_id in self._texts and (is_written or token_id in self._written_only):
                    control.append(token_id)
            ids.append(token_id)
        if control != [found.token_id for found in own]:
            first = next((self._texts[token_id] for token_id in control), "a control token")
            raise InvalidRequestError(
                f"A message has text that this model's tokenizer cannot tell from a control token ({quoted(first)}). "
                "Leave it out.",
                param="messages",
            )
        return ids

    def _find(self, text: str) -> list[_Found]:
        """Return the control tokens that the tokenizer recognises in a text, in order."""
        (encoding,) = self._finder.encode_batch([text], add_special_tokens=False)
        found: list[_Found] = []
        for finder_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            token_id = self._finder_ids.get(finder_id)
            if token_id is None:
                continue
            at = text.find(self._texts[token_id], start, end)  # it may take the spaces beside it with it
            found.append(
                _Found(token_id, start, end) if at < 0 else _Found(token_id, at, at + len(self._texts[token_id]))
            )
        return found


def _renamed(token: AddedToken, text: str | None) -> AddedToken:
    """Return a token with another text. None: the token as it is."""
    if text is None:
        return token
    return AddedToken(
        text,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _outside(content: Spans, found: list[_Found]) -> list[_Found]:
    """Return the tokens, in order, that have no character of content."""
    spans = iter(content)
    begin, end = next(spans, (0, 0))
    outside: list[_Found] = []
    for token in found:
        while end <= token.start and (span := next(spans, None)):
            begin, end = span
        if token.end <= begin or end <= token.start:
            outside.append(token)
    return outside


def _without(text: str, content: Spans) -> str:
    """Return a text with one sign for each span of content."""
    return _changed(text, content, lambda part: _COVER)


def _covered(text: str, content: Spans) -> str:
    """Return a text of the same length without the words of content.

    What a token's flags look at stays: the spaces at both ends of content, and whether it begins and ends with a word.
    """
    return _changed(text, content, _cover)


def _cover(part: str) -> str:
    words = part.strip()
    if not words:
        return part
    first, last = (_COVER if re.match(r"\W", letter) else "x" for letter in (words[0], words[-1]))
    return part.replace(words, (first + _COVER * (len(words) - 2) + last)[-len(words) :], 1)


def _changed(text: str, content: Spans, change: Callable[[str], str]) -> str:
    """Return a text with each span of content changed."""
    pieces: list[str] = []
    position = 0
    for begin, end in content:
        pieces.append(str.__getitem__(text, slice(position, begin)))
        pieces.append(change(str.__getitem__(text, slice(begin, end))))
        position = end
    return "".join([*pieces, str.__getitem__(text, slice(position, None))])
