"""Token ids to text, a few at a time, never splitting a character.

Owns: joining pieces, holding back the bytes of an unfinished character, the leading space. Leaves to others: a token's
contribution (pieces.py), stop strings (stop.py).

Does not use ``tokenizers.decoders.DecodeStream``: it decodes its whole window again for every token, grows that window
while the bytes form no character (quadratic time, no output), and can raise on such input.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Final

from lorafleet.workers.text.pieces import Piece, PieceTable
from lorafleet.workers.text.tokenizer import Tokenizer

_NUM_PROMPT_IDS: Final = 8  # longer than any character (4 bytes) or run of control tokens before an answer
_MAX_HELD_IDS: Final = 16  # for a decoder without a per-token rule


class IncrementalDetokenizer:
    """The text of one growing sequence of ids.

    All results of `push` and `finish`, joined, are the text that ``prompt_ids + ids`` has beyond ``prompt_ids``. The
    text of a sequence is defined as its tokens' bytes joined and read as UTF-8; each maximal invalid subsequence
    becomes one U+FFFD, and the leading space is removed if the decoder does so. For byte-level tokenizers this always
    equals ``Tokenizer.decode``. For tokenizers with byte fallback it does so if their byte tokens form valid UTF-8: for
    an invalid run of byte tokens the library gives one U+FFFD per token and drops its valid characters, but streamed
    text cannot be taken back.

    Without a prompt the first token starts a text, and a SentencePiece tokenizer drops its leading space; after a
    prompt it keeps it. Time and memory are linear in the number of ids.
    """

    __slots__ = ("_num_strip", "_opening", "_pending", "_table", "_window")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """prompt_ids: the ids before the first one pushed, or only their last eight. shown: ids of special tokens that
        are not skipped."""
        self._table: PieceTable | None = tokenizer.pieces(skip_special_tokens, shown)
        self._window: _WindowDetokenizer | None = None
        self._pending = b""  # the first bytes of a character, at most 3
        self._num_strip = 0
        self._opening = False  # no visible token yet, and the decoder treats the start of a text specially
        tail = prompt_ids[-_NUM_PROMPT_IDS:]
        if self._table is None:
            self._window = _WindowDetokenizer(tokenizer, tail, skip_special_tokens and not shown)
        else:
            self._num_strip = self._table.rules.num_strip
            self._opening = bool(self._num_strip or self._table.rules.drop_from_first)
            if tail:
                self.push(tail)  # the prompt's text is not output

    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids; return the text that has become final, ``""`` while a character is unfinished."""
        table = self._table
        if table is None:
            assert self._window is not None
            return self._window.push(token_ids)
        text = ""
        for token_id in token_ids:
            piece = table[token_id]
            if not piece:
                continue
            if self._opening:
                piece = self._open(token_id, piece, table)
            if type(piece) is str:
                if self._pending:
                    text += self._flush()
                text += piece
            else:
                assert isinstance(piece, bytes)
                data = self._pending + piece
                complete, num_read = utf_8_decode(data, "replace", False)
                self._pending = data[num_read:]
                text += complete
        return text

    def finish(self) -> str:
        """End the sequence; return the text held back, with U+FFFD for an incomplete character."""
        return self._window.finish() if self._window is not None else self._flush()

    def _flush(self) -> str:
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text

    def _open(self, token_id: int, piece: Piece, table: PieceTable) -> Piece:
        """Drop from a piece what the decoder drops at the start of a text."""
        if table.rules.drop_from_first:
            self._opening = False
            return table.first(token_id)
        if isinstance(piece, bytes):  # part of a character, so not a space
            self._opening = False
            return piece
        rest = piece
        while self._num_strip and rest.startswith(table.rules.strip_char):
            rest = rest[1:]
            self._num_strip -= 1
        self._opening = not rest and self._num_strip > 0
        return rest


class _WindowDetokenizer:
    """The detokenizer for decoders whose tokens depend on their neighbours (WordPiece, no decoder at all).

    Decodes the last settled tokens with and without the new ones and returns the difference, as vLLM and
    text-generation-inference do. Text that ends in U+FFFD is held back for at most `_MAX_HELD_IDS` ids.
    """

    __slots__ = ("_ids", "_num_settled", "_skip_special_tokens", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(prompt_ids)
        self._num_settled = len(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token_id in token_ids:
            self._ids.append(token_id)
            text += self._settle(final=len(self._ids) - self._num_settled >= _MAX_HELD_IDS)
        return text

    def finish(self) -> str:
        return self._settle(final=True)

    def _settle(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._num_settled], self._skip_special_tokens)
        after = self._tokenizer.decode(self._ids, self._skip_special_tokens)
        if not final and (len(after) <= len(before) or after.endswith("\ufffd")):
            return ""
        self._ids = self._ids[self._num_settled :] or self._ids
        self._num_settled = len(self._ids)
        return after[len(before) :]
