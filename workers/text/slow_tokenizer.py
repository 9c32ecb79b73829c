"""Adapters with only a slow tokenizer's files (vocab.json and merges.txt, or tokenizer.model; added_tokens.json).

Such a tokenizer must be the model's with more tokens; others are refused. Its vocabulary must be the model's. The
adapter's tokenizer is then the model's tokenizer.json plus the added tokens, each under the id given by the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from lorafleet.workers.errors import ModelError, cut, quoted
from lorafleet.workers.found_file import json_object

SLOW_FILES: Final[tuple[str, ...]] = (
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files that define the vocabulary if there is no tokenizer.json."""

_CONFIG = "tokenizer_config.json"
_ADVICE = "Write a tokenizer.json beside it: transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
# Other options of a slow tokenizer; the model's tokenizer.json has one fixed setting of each.
_SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def with_slow_files(model: Mapping[str, bytes], own: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return an adapter's files with a slow tokenizer's replaced by a tokenizer.json; without one, unchanged.

    Raises ModelError for a slow tokenizer that is not the model's with more tokens.
    """
    rest = {name: data for name, data in own.items() if name not in SLOW_FILES}
    if "tokenizer.json" in own:
        return rest
    has_vocabulary = any(name in own for name in SLOW_FILES if name != "added_tokens.json")
    added = _added(own)
    if not has_vocabulary and not added:
        return rest
    base = _base(model)
    ids = _ids(base)
    if has_vocabulary:
        _check_vocabulary(own, base, ids)
        _check_switches(model, own)
    new = _new_tokens(added, ids)
    if not new:
        return rest
    base["added_tokens"] = [*base.get("added_tokens", []), *new]
    return rest | {"tokenizer.json": json.dumps(base).encode()}


def _base(model: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        base = json_object(model["tokenizer.json"])
    except ValueError as error:
        raise ModelError(f"The model's tokenizer.json {error}.") from error
    if not isinstance(base.get("model"), dict):
        raise ModelError("The model's tokenizer.json has no model.")
    return base


def _ids(base: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of all the model's tokens."""
    vocabulary = base["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram's: [piece, score]
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in base.get("added_tokens", [])}


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        return json_object(files.get(name, b"{}"))
    except ValueError as error:
        raise ModelError(f"{name} {error}.") from error


def _added(own: Mapping[str, bytes]) -> dict[str, tuple[int, dict[str, Any]]]:
    """Return the tokens that the files add, by text: (id, flags)."""
    added: dict[str, tuple[int, dict[str, Any]]] = {}
    config = _object(own, _CONFIG)
    for text, token_id in _object(own, "added_tokens.json").items():
        if type(token_id) is not int or token_id < 0:
            raise ModelError(f"added_tokens.json gives {quoted(text)} the id {quoted(token_id)}.")
        is_special = any(value == text for key, value in config.items() if key.endswith("_token"))
        added[text] = token_id, {"special": is_special, "normalized": not is_special}
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ModelError(f"added_tokens_decoder of {_CONFIG} must be an object of token ids.")
    for key, token in decoder.items():
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str) or not content or not key.isdecimal() or len(key) > 9:
            raise ModelError(
                f"added_tokens_decoder of {_CONFIG} has {quoted(key)}: {quoted(token)}, which is not a token."
            )
        flags = {flag: bool(token.get(flag)) for flag in _FLAGS} if isinstance(token, dict) else {"special": True}
        if content in added and added[content][0] != int(key):
            raise ModelError(
                f"added_tokens.json gives {quoted(content)} the id {added[content][0]}, {_CONFIG} the id {int(key)}."
            )
        added[content] = int(key), flags
    return added


def _new_tokens(added: Mapping[str, tuple[int, dict[str, Any]]], ids: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the tokens the model lacks, in tokenizer.json's form. Their ids must follow the model's, without gaps."""
    new = []
    next_id = max(ids.values(), default=-1) + 1
    for text, (token_id, flags) in sorted(added.items(), key=lambda item: item[1][0]):
        if text in ids:
            if ids[text] != token_id:
                raise ModelError(
                    f"The adapter's tokenizer has the token {quoted(text)} as {token_id}, the model's as {ids[text]}. "
                    f"{_ADVICE}"
                )
            continue
        if token_id != next_id:
            raise ModelError(
                f"The adapter's tokenizer adds the token {quoted(text)} as {token_id}; the next id after the model's "
                f"is {next_id}. {_ADVICE}"
            )
        next_id += 1
        new.append({"id": token_id, "content": text, **dict.fromkeys(_FLAGS, False), **flags})
    return new


def _check_vocabulary(own: Mapping[str, bytes], base: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    other = next((name for name in ("vocab.txt", "spiece.model", "sentencepiece.bpe.model") if name in own), None)
    if other is not None:
        raise ModelError(
            f"The adapter's tokenizer is {other} without a tokenizer.json, which is not supported. {_ADVICE}"
        )
    if "tokenizer.model" in own:
        pieces = dict(enumerate(sentencepieces(own["tokenizer.model"])))
        if not pieces:
            raise ModelError(f"tokenizer.model is not a SentencePiece model. {_ADVICE}")
        known = {token_id: text for text, token_id in ids.items()}
        is_whole = len(pieces) == len(base["model"].get("vocab") or ())
        if not is_whole or any(known.get(token_id) != piece for token_id, piece in pieces.items()):
            raise _other_vocabulary("tokenizer.model")
        return
    if not {"vocab.json", "merges.txt"} <= own.keys():
        missing = "merges.txt" if "vocab.json" in own else "vocab.json"
        raise ModelError(f"The adapter's tokenizer lacks {missing}. {_ADVICE}")
    vocabulary = _object(own, "vocab.json")
    added = {text: token_id for text, (token_id, _) in _added(own).items()}
    required = base["model"].get("vocab")
    if not isinstance(required, dict) or any(vocabulary.get(text) != token_id for text, token_id in required.items()):
        raise _other_vocabulary("vocab.json")
    if any(ids.get(text, added.get(text)) != token_id for text, token_id in vocabulary.items()):
        raise _other_vocabulary("vocab.json")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in base["model"]["merges"]]
    if merges != list(_merges(own["merges.txt"])):
        raise _other_vocabulary("merges.txt")


def _check_switches(model: Mapping[str, bytes], own: Mapping[str, bytes]) -> None:
    config, base = _object(own, _CONFIG), _object(model, _CONFIG)
    for name in _SWITCHES:
        value = config.get(name)
        if value is not None and value != base.get(name, False if name != "add_bos_token" else value):
            raise ModelError(f"The adapter's {_CONFIG} has {name}={quoted(value)}, unlike the model's. {_ADVICE}")


def _other_vocabulary(name: str) -> ModelError:
    return ModelError(
        f"The adapter has a tokenizer without a tokenizer.json, and its {name} is not the model's. {_ADVICE}"
    )


def _merges(data: bytes) -> Iterator[tuple[str, ...]]:
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ModelError(f"merges.txt is not UTF-8: {error.reason} at byte {error.start}.") from error
    for number, line in enumerate(lines):
        if line.strip() and not (number == 0 and line.startswith("#version")):
            yield tuple(line.rstrip("\r").split(" "))


def sentencepieces(data: bytes) -> Iterator[str]:
    """Yield the pieces of a SentencePiece model, by id: field 1 of each submessage in field 1 of its protobuf message.

    Raises ModelError.
    """
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                yield next(piece for field, piece in _fields(value) if field == 1 and isinstance(piece, bytes)).decode()
    except (IndexError, StopIteration, UnicodeDecodeError, ValueError, RuntimeError) as error:
        raise ModelError(f"tokenizer.model is not a SentencePiece model ({cut(str(error))}). {_ADVICE}") from error


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) of each field of a protobuf message; values of fixed-size fields are left out."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind, value = key & 7, b""
        if kind == 0:
            number, position = _varint(data, position)
            yield key >> 3, number
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field of the kind {kind}")
        length, position = _varint(data, position) if kind == 2 else (8 if kind == 1 else 4, position)
        if length > len(data) - position:
            raise ValueError("it is truncated")
        value = data[position : position + length] if kind == 2 else b""
        position += length
        yield key >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than 64 bits")
