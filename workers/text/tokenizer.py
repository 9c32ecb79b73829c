"""A model's tokenizer, read from its files without transformers.

Owns: checking the files' contents, text to ids, ids to text, the bytes of a token, the special tokens. Leaves to
others: streams of ids (detokenizer.py), chat templates (chat_template.py; this only provides their source).

tokenizer.json decides: its pre-tokenizer, post-processor and decoder are used unchanged, and tokens that only the other
files declare are added, as transformers' ``AutoTokenizer`` does. Two differences when comparing:

* ``add_bos_token`` and ``add_eos_token`` of tokenizer_config.json have no effect beside a tokenizer.json, whose
  post-processor decides. transformers 5 does the same.
* transformers 5 rebuilds the tokenizers of some classes (LlamaTokenizer, GPT2Tokenizer, Qwen2Tokenizer, ...) from the
  vocabulary alone, in the class's standard form. If the file differs, this module follows the file, like earlier
  transformers and the model's training. This matters for Llama-2's files, whose ``Prepend`` normalizer puts a space
  before text that follows a special token.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import tokenizers

from lorafleet.workers.errors import ContextLengthError, InvalidRequestError, ModelError, cut, quoted
from lorafleet.workers.found_file import LFS_ADVICE, LFS_POINTER, json_object
from lorafleet.workers.text.control_tokens import ControlTokens
from lorafleet.workers.text.pieces import DecoderRules, PieceTable

TOKENIZER_FILES: Final[tuple[str, ...]] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
)
"""Files that `Tokenizer` reads; only the first is required."""

_SHORT: Final = 1 << 12  # characters or ids that take a millisecond: shorter calls keep the GIL
_PIECE_CHARS: Final = 1 << 16  # characters of a long text encoded at a time to count its tokens
_USUAL_CHARS: Final = 8  # per token: a text with fewer is encoded without a check first

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back. Immutable and thread-safe; the heavy calls release the GIL.

    special_tokens: the declared ones, ``{"bos_token": "<s>", ...}``; pass them to `ChatTemplate.render` with ``**``.
    bos_token_id: None if the model has none. eos_token_ids: all ids that end a generation: those of
    generation_config.json and config.json and the tokenizer's own. special_token_ids: the ids that
    ``skip_special_tokens`` hides. vocab_size: number of tokens, added ones included (the model's embedding may have
    more rows). chat_templates: source by name; a model with one template calls it "default".
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """Wrap a tokenizer of the tokenizers library, which must not be changed afterwards."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens: Mapping[str, Any] = dict(special_tokens or {})  # values are str; Any lets ** type-check
        self.chat_templates: Mapping[str, str] = dict(chat_templates or {})
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._added_ids = {token.content: token_id for token_id, token in added.items()}
        self.special_token_ids: frozenset[int] = frozenset(
            token_id for token_id, token in added.items() if token.special
        )
        self.bos_token_id: int | None = self._id_of("bos_token")
        own_eos = self._id_of("eos_token")
        self._own_eos_token_ids: frozenset[int] = frozenset() if own_eos is None else frozenset({own_eos})
        self.eos_token_ids: frozenset[int] = self._own_eos_token_ids.union(eos_token_ids)
        self._source: str | None = None  # of files: what stands for all but eos_token_ids and chat_templates
        decoder = backend.decoder
        rules = DecoderRules.parse(None if decoder is None else json.loads(decoder.__getstate__()))
        self._pieces: PieceTable | None = None
        self._visible_pieces: PieceTable | None = None
        self._shown_pieces: dict[frozenset[int], PieceTable] = {}  # by the special tokens shown, a few sets
        if rules is not None:
            self._pieces = PieceTable(rules, backend.id_to_token, frozenset())
            self._visible_pieces = PieceTable(rules, backend.id_to_token, self.special_token_ids)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], known: Iterable[Tokenizer] = ()) -> Tokenizer:
        """Build a tokenizer from file contents by name (`TOKENIZER_FILES`); other names are ignored.

        known: others. One of them with the same vocabulary, rules and tokens lends it these: reading them takes long,
        holds the GIL meanwhile, and would put them into memory once more.

        Raises ModelError for a missing or bad file.
        """
        if "tokenizer.json" not in files:
            raise ModelError(
                "There is no tokenizer.json. A model needs one; for a model with only a SentencePiece or "
                "vocab/merges file, write one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained()."
            )
        if files["tokenizer.json"].startswith(LFS_POINTER):
            raise ModelError(f"tokenizer.json {LFS_ADVICE}.")
        config = _json_object(files, "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= _json_object(files, "special_tokens_map.json")
        templates = _chat_templates(config)
        if "chat_template.jinja" in files:
            try:
                templates = {"default": files["chat_template.jinja"].decode()}
            except UnicodeDecodeError as error:
                raise ModelError(f"chat_template.jinja is not UTF-8: {error}.") from error
        eos_token_ids = _eos_ids(files, "generation_config.json") | _eos_ids(files, "config.json")
        source = _digest(files["tokenizer.json"], {key: config[key] for key in config.keys() - {"chat_template"}})
        like = next((other for other in known if other._source == source), None)
        if like is not None:
            return like._with(eos_token_ids, templates)
        try:
            backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises bare Exception or ValueError
            raise ModelError(f"tokenizer.json is not a tokenizer: {cut(str(error))}.") from error
        special_tokens = _declare_tokens(backend, config)
        tokenizer = cls(backend, special_tokens=special_tokens, eos_token_ids=eos_token_ids, chat_templates=templates)
        tokenizer._source = source
        return tokenizer

    def _with(self, eos_token_ids: Iterable[int], chat_templates: Mapping[str, str]) -> Tokenizer:
        """Return a tokenizer with the same vocabulary, rules and tokens."""
        other = copy.copy(self)
        other.chat_templates = dict(chat_templates)
        other.eos_token_ids = self._own_eos_token_ids.union(eos_token_ids)
        other.__dict__.pop("_control_tokens", None)  # depends on these
        return other

    def to_json(self) -> str:
        """Return it as one tokenizer.json, with the tokens that only other files declare."""
        return self._backend.to_str()

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None) -> list[int]:
        """Convert text to ids. max_tokens: a text that surely has more is refused before all of it is encoded.

        Raises InvalidRequestError for a string that is not Unicode text (unpaired surrogates), ContextLengthError.
        """
        if max_tokens is not None:
            self._check_length(text, max_tokens)
        if len(text) > _SHORT:
            return self.encode_batch([text], add_special_tokens)[0]
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            if not isinstance(text, str):
                raise
            raise _not_unicode(text) from error
        except BaseException as error:
            _name_panic(error)
            raise

    def encode_traced(self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None) -> list[int]:
        """`encode` a text in which what is traced as a request's has no control tokens, whatever it looks like."""
        if max_tokens is not None:
            self._check_length(text, max_tokens)
        if _surrogate_at(text) is not None:
            raise _not_unicode(text)
        try:
            if self._control_tokens.in_content(text):
                return self._control_tokens.encode(text, add_special_tokens)
        except BaseException as error:
            _name_panic(error)
            raise
        return self.encode(text, add_special_tokens)

    @functools.cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self._backend, self.eos_token_ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` several texts on several cores. Releases the GIL, unlike the library's `encode`."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as error:
            if not all(isinstance(text, str) for text in texts):
                raise
            raise next(_not_unicode(text) for text in texts if _surrogate_at(text) is not None) from error
        except BaseException as error:
            _name_panic(error)
            raise
        return [encoding.ids for encoding in encodings]

    @functools.cached_property
    def _max_token_chars(self) -> int:
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def _check_length(self, text: str, max_tokens: int) -> None:
        """Raise ContextLengthError for a text that cannot fit into `max_tokens`.

        Splitting a text can add tokens at each split, so there is some slack.
        """
        if len(text) <= max_tokens * _USUAL_CHARS:
            return
        max_chars = max_tokens * self._max_token_chars
        if len(text) > max_chars:
            raise ContextLengthError.beyond(
                max_tokens,
                f"The text has {len(text)} characters; so many tokens hold at most {max_chars}, since the longest "
                f"token has {self._max_token_chars}. Shorten it.",
            )
        if len(text) <= _PIECE_CHARS:
            return
        num_tokens, slack = 0, max_tokens // 4
        for start in range(0, len(text), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            num_tokens += len(self.encode_batch([piece], add_special_tokens=False)[0])
            slack += 16
            if num_tokens > max_tokens + slack:
                raise ContextLengthError.beyond(
                    max_tokens,
                    f"The text has {len(text)} characters, of which the first {start + len(piece)} alone have "
                    f"{num_tokens} tokens. Shorten it.",
                )

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Convert ids to text, all at once. Unknown ids contribute nothing."""
        if len(token_ids) > _SHORT:  # as in `encode`, the call that releases the GIL
            return self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def check_ids(self, token_ids: Sequence[int], vocab_size: int, param: str) -> None:
        """Check that all ids are valid. vocab_size: the number of the model's embedding rows; the tokenizer may have
        more.

        Raises InvalidRequestError, which names the token.
        """
        low, high = min(token_ids, default=0), max(token_ids, default=0)
        if low >= 0 and high < vocab_size:
            return
        bad = low if low < 0 else high
        token = self._backend.id_to_token(bad) if 0 <= bad < self.vocab_size else None
        known = "" if token is None else f" (the tokenizer's {quoted(token)}, for which the model has no row)"
        raise InvalidRequestError(
            f"{param} has the token id {quoted(bad)}{known}; ids go from 0 to {vocab_size - 1}.", param=param
        )

    def id_to_token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it (``Ġthe``, ``▁the``), or None."""
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None."""
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes a token adds in the middle of a text, also for special tokens; None for an unknown id."""
        if self._backend.id_to_token(token_id) is None:
            return None
        if self._pieces is None:
            return self._backend.decode([token_id], skip_special_tokens=False).encode()
        piece = self._pieces[token_id]
        return piece if isinstance(piece, bytes) else piece.encode()

    def decode_token(self, token_id: int) -> str:
        """Return one token as text with its leading space; U+FFFD for part of a character; ``""`` if unknown."""
        return (self.token_bytes(token_id) or b"").decode(errors="replace")

    def special_ids(self, tokens: Iterable[str]) -> frozenset[int]:
        """Return the ids of those of some tokens that are special."""
        return self.special_token_ids.intersection(map(self._added_ids.get, tokens))

    def added_id(self, text: str) -> int | None:
        """Return the id of a token that stands for a text wherever it occurs; None if there is none."""
        return self._added_ids.get(text)

    def pieces(self, skip_special_tokens: bool, shown: frozenset[int] = frozenset()) -> PieceTable | None:
        """Return the detokenizer's table; None if this decoder does not work token by token.

        shown: ids of special tokens that are not skipped.
        """
        if not skip_special_tokens or self._pieces is None:
            return self._pieces
        if not shown:
            return self._visible_pieces
        table = self._shown_pieces.get(shown)
        if table is None:
            hidden = self.special_token_ids - shown
            table = self._shown_pieces[shown] = PieceTable(self._pieces.rules, self._backend.id_to_token, hidden)
        return table


def _surrogate_at(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _not_unicode(text: str) -> InvalidRequestError:
    position = _surrogate_at(text)
    assert position is not None, "the tokenizer refused a valid text"
    return InvalidRequestError(
        f"The text is not valid Unicode: an unpaired surrogate (U+{ord(text[position]):04X}) at character {position}."
    )


def _name_panic(error: BaseException) -> None:
    """Recognise a panic of the library's Rust code, not an Exception, for a pattern of tokenizer.json that takes too
    long.

    Raises InvalidRequestError for that.
    """
    if type(error).__name__ == "PanicException":
        raise InvalidRequestError(f"The model's tokenizer cannot take this text: {cut(str(error))}.") from error


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        return json_object(files.get(name, b"{}"))
    except ValueError as error:
        raise ModelError(f"{name} {error}.") from error


def _digest(tokenizer_json: bytes, config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode() + b"\0" + tokenizer_json).hexdigest()


def _eos_ids(files: Mapping[str, bytes], name: str) -> set[int]:
    value = _json_object(files, name).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise ModelError(f"eos_token_id of {name} must be a token id or a list of them, not {quoted(value)}.")
    return set(ids)


def _added_token(value: Any, key: str) -> tokenizers.AddedToken:
    """Build an added token from its JSON form, a string or an object."""
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True, normalized=False)
    try:
        flags = {name: flag for name, flag in value.items() if name not in ("__type", "content")}
        return tokenizers.AddedToken(value["content"], **flags)
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{cut(key)} of tokenizer_config.json is not a token: {quoted(value)}.") from error


def _declare_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """Add to `backend` the tokens that only `config` declares; return the named special tokens."""
    declared = config.get("added_tokens_decoder", {})
    if not isinstance(declared, dict) or not all(key.isdecimal() and len(key) < 10 for key in declared):
        raise ModelError("added_tokens_decoder of tokenizer_config.json must be an object of token ids.")
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    added = [_added_token(declared[key], "added_tokens_decoder") for key in sorted(declared, key=int)]
    missing = [token for token in added if repr(token) not in known]

    named = {
        name: _added_token(value, name)
        for name, value in config.items()
        if (name in _SPECIAL_NAMES and value is not None) or (name.endswith("_token") and isinstance(value, str))
    }
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(extra, list):
        raise ModelError(f"The extra special tokens of tokenizer_config.json must be a list, not {quoted(extra)}.")
    contents = {token.content for token in backend.get_added_tokens_decoder().values()}
    contents.update(token.content for token in missing)
    for token in [*named.values(), *(_added_token(value, "extra_special_tokens") for value in extra)]:
        if token.content not in contents:
            contents.add(token.content)
            token.special = True
            missing.append(token)
    if missing:
        backend.add_tokens(missing)
    return {name: token.content for name, token in named.items() if name in _SPECIAL_NAMES}


def _chat_templates(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the templates of tokenizer_config.json: one string, or a list of ``{"name", "template"}``."""
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        templates = {entry["name"]: entry["template"] for entry in value} if isinstance(value, list) else dict(value)
    except (KeyError, TypeError, ValueError):
        templates = {"": None}
    if not all(isinstance(source, str) for source in templates.values()):
        raise ModelError("chat_template of tokenizer_config.json must be a string or a list of templates.")
    return templates
