"""Words as sequences of token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from lorafleet.workers.text.bad_words import forbidden_sequences
from lorafleet.workers.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("bad-words")
    tiny.save_tokenizer(directory)
    return Tokenizer.from_files({"tokenizer.json": (directory / "tokenizer.json").read_bytes()})


def test_a_word_has_two_forms_whatever_spaces_come_before_it(tokenizer: Tokenizer) -> None:
    first, second = forbidden_sequences(tokenizer, ["the"])
    assert (tokenizer.decode(first), tokenizer.decode(second)) == ("the", " the")
    assert forbidden_sequences(tokenizer, ["  the", "the"]) == (first, second)


def test_a_word_of_spaces_is_taken_as_it_is(tokenizer: Tokenizer) -> None:
    (sequence,) = forbidden_sequences(tokenizer, ["\n"])
    assert tokenizer.decode(sequence) == "\n"


def test_no_words_are_no_sequences(tokenizer: Tokenizer) -> None:
    assert forbidden_sequences(tokenizer, []) == ()
