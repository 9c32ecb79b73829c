"""A slow tokenizer of an adapter must be the model's with more tokens; others are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorafleet.workers.errors import ModelError
from lorafleet.workers.text import Tokenizer
from lorafleet.workers.text.files import over_model, read_text_files
from lorafleet.workers.text.slow_tokenizer import sentencepieces

Files = dict[str, bytes]


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def byte_level_files(byte_level_dir: Path) -> Files:
    return read_text_files(byte_level_dir)


@pytest.fixture(scope="module")
def metaspace_files(metaspace_dir: Path) -> Files:
    return read_text_files(metaspace_dir)


def full(files: Files) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(files["tokenizer.json"])
    return value


def next_id(files: Files) -> int:
    tokens = full(files)
    ids: list[int] = [*tokens["model"]["vocab"].values(), *(token["id"] for token in tokens["added_tokens"])]
    return max(ids) + 1


def slow_bpe(files: Files, added: dict[str, int] | None = None, **config: Any) -> Files:
    """Files that a slow BPE tokenizer saves, with the added tokens in its vocab.json or not."""
    tokens = full(files)
    merges = "\n".join(" ".join(pair) for pair in tokens["model"]["merges"])
    decoder = {str(i): {"content": text, "special": True, "normalized": False} for text, i in (added or {}).items()}
    return {
        "vocab.json": dumped(tokens["model"]["vocab"]),
        "merges.txt": f"#version: 0.2\n{merges}\n".encode(),
        "added_tokens.json": dumped(added or {}),
        "tokenizer_config.json": dumped({"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"} | config),
    }


def sentencepiece_model(pieces: list[str]) -> bytes:
    """A ModelProto: pieces with a score each, followed by a trainer_spec."""

    def field(number: int, data: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(data)) + data

    def varint(value: int) -> bytes:
        out = b""
        while value > 0x7F:
            out += bytes([value & 0x7F | 0x80])
            value >>= 7
        return out + bytes([value])

    entries = (field(1, field(1, piece.encode()) + b"\x15\x00\x00\x80\xbf\x18\x01") for piece in pieces)
    return b"".join(entries) + field(2, b"\x18\x02" * 9)


def slow_sentencepiece(files: Files, added: dict[str, int] | None = None) -> Files:
    vocabulary = full(files)["model"]["vocab"]
    return {
        "tokenizer.model": sentencepiece_model(sorted(vocabulary, key=vocabulary.get)),
        "added_tokens.json": dumped(added or {}),
        "tokenizer_config.json": dumped({"add_bos_token": True, "eos_token": "</s>", "pad_token": "[PAD]"}),
    }


def test_added_tokens_have_their_ids_and_the_rest_is_as_the_models(byte_level_files: Files) -> None:
    first = next_id(byte_level_files)
    added = {"<|tool|>": first, "<|/tool|>": first + 1}
    files = over_model(byte_level_files, slow_bpe(byte_level_files, added))
    ours, base = Tokenizer.from_files(files), Tokenizer.from_files(byte_level_files)
    text = "The quick <|tool|>brown fox<|/tool|> jumps"
    parts = [base.encode(part) for part in ("The quick ", "brown fox", " jumps")]
    assert ours.encode(text) == [*parts[0], first, *parts[1], first + 1, *parts[2]]
    assert {first, first + 1} <= ours.special_token_ids
    assert "vocab.json" not in files and "merges.txt" not in files


def test_the_ids_are_those_of_transformers(byte_level_files: Files, tmp_path: Path) -> None:
    """The case that the reference reads: a vocab.json with the added tokens, as older versions saved it."""
    first = next_id(byte_level_files)
    own = slow_bpe(byte_level_files, {"<|tool|>": first}, tokenizer_class="GPT2Tokenizer", unk_token=None)
    tokens = full(byte_level_files)
    own["vocab.json"] = dumped(tokens["model"]["vocab"] | {t["content"]: t["id"] for t in tokens["added_tokens"]})
    for name, data in own.items():
        (tmp_path / name).write_bytes(data)
    text = "walk <|tool|> to the market"
    ours = Tokenizer.from_files(over_model(byte_level_files, own)).encode(text)
    assert first in ours
    assert ours == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]


def test_a_sentencepiece_model_with_the_models_pieces_is_the_models(metaspace_files: Files) -> None:
    first = next_id(metaspace_files)
    files = over_model(metaspace_files, slow_sentencepiece(metaspace_files, {"[PAD]": first}))
    tokenizer = Tokenizer.from_files(files)
    assert tokenizer.token_to_id("[PAD]") == first
    assert tokenizer.encode("fox [PAD]")[-1] == first
    assert over_model(metaspace_files, slow_sentencepiece(metaspace_files)) == metaspace_files


@pytest.mark.parametrize("own", [slow_bpe, lambda files: {"added_tokens.json": b"{}"}])
def test_files_that_add_nothing_leave_the_models_tokenizer(
    own: Callable[[Files], Files], byte_level_files: Files
) -> None:
    assert over_model(byte_level_files, own(byte_level_files)) == byte_level_files


def test_added_tokens_without_a_vocabulary_are_added_to_the_models(byte_level_files: Files) -> None:
    first = next_id(byte_level_files)
    for own in (
        {"added_tokens.json": dumped({"<new>": first})},
        {"tokenizer_config.json": dumped({"added_tokens_decoder": {str(first): {"content": "<new>"}}})},
    ):
        assert Tokenizer.from_files(over_model(byte_level_files, own)).encode("<new>") == [first]


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Files], Files]:
    def own(files: Files) -> Files:
        made = slow_bpe(files)
        return made | {name: dumped(change(json.loads(made[name])))}

    return own


def without(name: str) -> Callable[[Files], Files]:
    return lambda files: {key: data for key, data in slow_bpe(files).items() if key != name}


REFUSED: dict[str, tuple[Callable[[Files], Files], str]] = {
    "another vocabulary": (changed("vocab.json", lambda v: v | {"zebra": 9999}), r"vocab\.json is not the model's"),
    "a token is gone": (changed("vocab.json", lambda v: dict(list(v.items())[:-1])), r"vocab\.json is not the model's"),
    "two ids are swapped": (
        changed("vocab.json", lambda v: v | dict(zip(list(v)[9:11], [v[list(v)[10]], v[list(v)[9]]], strict=True))),
        r"vocab\.json is not the model's",
    ),
    "other merges": (
        lambda f: slow_bpe(f) | {"merges.txt": b"#version: 0.2\na b\n"},
        r"merges\.txt is not the model's",
    ),
    "no merges": (without("merges.txt"), r"lacks merges\.txt"),
    "no vocabulary": (without("vocab.json"), r"lacks vocab\.json"),
    "a gap": (lambda f: slow_bpe(f, {"<x>": next_id(f) + 3}), r"adds the token '<x>' as"),
    "another id": (lambda f: slow_bpe(f, {"<|im_start|>": 300}), r"'<\|im_start\|>' as 300, the model's as 1"),
    "two ids": (
        lambda f: slow_bpe(f, {"<x>": next_id(f)}) | {"added_tokens.json": dumped({"<x>": 5})},
        r"gives '<x>' the id 5",
    ),
    "another end": (lambda f: slow_bpe(f, add_eos_token=True), "add_eos_token=True"),
    "wordpiece": (lambda f: {"vocab.txt": b"[PAD]\n[UNK]\n"}, r"vocab\.txt without a tokenizer\.json"),
    "t5": (lambda f: {"spiece.model": sentencepiece_model(["a"])}, r"spiece\.model without"),
    "another sentencepiece": (lambda f: {"tokenizer.model": sentencepiece_model(["a", "b"])}, r"not the model's"),
    "tiktoken": (lambda f: {"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "not a SentencePiece model"),
    "rubbish": (lambda f: {"tokenizer.model": b"\xff" * 1000}, "not a SentencePiece model"),
    "cut off": (lambda f: {"tokenizer.model": b"\x0a\x7f"}, "not a SentencePiece model"),
    "no object": (lambda f: {"added_tokens.json": b"[1]"}, r"added_tokens\.json holds list"),
    "deep": (lambda f: {"added_tokens.json": b"[" * 100_000}, r"added_tokens\.json cannot be read"),
    "ids of other types": (lambda f: {"added_tokens.json": b'{"a": "1"}'}, r"the id '1'"),
    "a number of 5,000 digits": (lambda f: {"added_tokens.json": b'{"a": ' + b"9" * 5000 + b"}"}, "cannot be read"),
    "a decoder of another type": (lambda f: {"tokenizer_config.json": b'{"added_tokens_decoder": [1]}'}, "an object"),
    "not UTF-8": (lambda f: slow_bpe(f) | {"merges.txt": b"\xff"}, r"merges\.txt is not UTF-8"),
}


@pytest.mark.parametrize(("own", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_the_models_with_more_tokens_is_refused_by_name(
    own: Callable[[Files], Files], message: str, byte_level_files: Files
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        over_model(byte_level_files, own(byte_level_files))
    assert len(caught.value.message) < 600


def test_pieces_are_read_with_their_ids() -> None:
    assert list(sentencepieces(sentencepiece_model(["<unk>", "▁a", "x" * 300]))) == ["<unk>", "▁a", "x" * 300]
