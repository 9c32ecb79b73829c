"""What one token contributes to the text: the decoder of tokenizer.json, taken apart into a per-token rule.

The decoders that language models use (byte-level BPE; SentencePiece with byte fallback; Metaspace) join the tokens'
own contributions, so that text can be built one token at a time with a table look-up. `DecoderRules.parse` recognises
them and returns None for any other, which the detokenizer then handles with windows of whole decodes.

A piece is ``str`` when it is made of whole characters and ``bytes`` when it holds a part of one.

Owns: the reading of the decoder and the table. Leaves to others: joining pieces (detokenizer.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Piece: TypeAlias = str | bytes

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[int, int]:
    """Code point to byte: GPT-2's printable stand-ins. Bytes that are no visible Latin-1 character live at 256 + n."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {byte: byte for byte in visible} | {256 + n: byte for n, byte in enumerate(hidden)}


_BYTE_OF_CODE_POINT = _byte_level_alphabet()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderRules:
    """How a token's string becomes its piece, and what happens at the start of a text.

    byte_level: every character of a token stands for a byte. replacements: (from, to), in order. byte_fallback:
    ``<0xE2>`` is a byte. strip_char, num_strip: up to so many of this character are dropped from the start of the
    text. drop_from_first: a character dropped wherever the first token has it (Metaspace).
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_char: str = ""
    num_strip: int = 0
    drop_from_first: str = ""

    @classmethod
    def parse(cls, decoder: Mapping[str, Any] | None) -> DecoderRules | None:
        """Read the ``decoder`` object of tokenizer.json; None if tokens cannot be decoded one by one under it."""
        if decoder is None:
            return None
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        if steps and steps[0]["type"] == "ByteLevel":
            return cls(byte_level=True) if all(step["type"] == "Fuse" for step in steps[1:]) else None
        replacements: list[tuple[str, str]] = []
        byte_fallback = fused = False
        strip_char, num_strip, drop_from_first = "", 0, ""
        for step in steps:
            kind = step["type"]
            if kind == "Fuse":
                fused = True
            elif num_strip or (fused and kind != "Strip"):
                return None  # a step that sees the joined text
            elif kind == "Replace" and "String" in step["pattern"] and not byte_fallback:
                replacements.append((step["pattern"]["String"], step["content"]))
            elif kind == "Metaspace" and not byte_fallback and not replacements:
                replacements.append((step["replacement"], " "))
                if step.get("prepend_scheme", "always") != "never":
                    drop_from_first = step["replacement"]
            elif kind == "ByteFallback":
                byte_fallback = True
            elif kind == "Strip" and fused and not step["stop"]:
                strip_char, num_strip = step["content"], step["start"]
            else:
                return None
        return cls(
            byte_level=False,
            replacements=tuple(replacements),
            byte_fallback=byte_fallback,
            strip_char=strip_char,
            num_strip=num_strip,
            drop_from_first=drop_from_first,
        )

    def piece(self, token: str) -> Piece:
        """The piece of a token, given as the vocabulary spells it. One that is an added token follows the same rule."""
        if self.byte_level:
            # A token with a character outside the alphabet (an added one such as "<|im start|>") stands for itself.
            codes = [_BYTE_OF_CODE_POINT.get(ord(char)) for char in token]
            return _whole(bytes(code for code in codes if code is not None)) if None not in codes else token
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return _whole(bytes([int(match[1], 16)]))
        return token

    def first_piece(self, token: str) -> Piece:
        """The piece of a token that opens a text, before `num_strip` is applied."""
        return self.piece(token.replace(self.drop_from_first, "") if self.drop_from_first else token)


def _whole(data: bytes) -> Piece:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


class PieceTable(dict[int, Piece]):
    """Token id to piece, filled as ids are met: ``table[token_id]``. An id that no token has gives ``""``.

    Shared by all requests of a tokenizer; filling it from several threads at once is harmless (equal values).
    """

    def __init__(self, rules: DecoderRules, id_to_token: Callable[[int], str | None], hidden: frozenset[int]) -> None:
        """hidden: ids that contribute nothing (special tokens that are skipped)."""
        super().__init__(dict.fromkeys(hidden, ""))
        self.rules = rules
        self._id_to_token = id_to_token

    def __missing__(self, token_id: int) -> Piece:
        token = self._id_to_token(token_id)
        if token is None:
            return ""  # not stored: the table must not grow beyond the vocabulary
        piece = self[token_id] = self.rules.piece(token)
        return piece

    def first(self, token_id: int) -> Piece:
        """The piece of a token that opens a text; only for one whose ``table[token_id]`` is not empty."""
        token = self._id_to_token(token_id)
        assert token is not None, token_id
        return self.rules.first_piece(token)
