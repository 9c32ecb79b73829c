"""Pushes and finish, joined, are compared with one-shot decodes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorafleet.workers.text import IncrementalDetokenizer, Tokenizer

HARD = "the café 日本語 👩‍👩‍👧‍👦 e\u0301 🇫🇷 नमस्ते <tool call> \n\t x"
MANY = settings(deadline=None, max_examples=300)
TOKEN_IDS = st.lists(st.integers(0, 450), max_size=40)
CUTS = st.lists(st.integers(0, 40), max_size=6)


def streamed(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int], prompt: list[int] | None = None, skip: bool = True
) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt or [], skip_special_tokens=skip)
    ends = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    return "".join(detokenizer.push(ids[begin:end]) for begin, end in pairwise(ends)) + detokenizer.finish()


def defined(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    """The documented text of a sequence, from the bytes of its tokens."""
    shown = [i for i in ids if not (skip and i in tokenizer.special_token_ids)]
    return b"".join(tokenizer.token_bytes(i) or b"" for i in shown).decode(errors="replace")


@MANY
@given(ids=TOKEN_IDS, cuts=CUTS, skip=st.booleans())
def test_any_byte_level_ids_give_what_one_decode_gives(
    byte_level: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    assert streamed(byte_level, ids, cuts, skip=skip) == byte_level.decode(ids, skip_special_tokens=skip)


@MANY
@given(ids=TOKEN_IDS, cuts=CUTS, skip=st.booleans())
@example(ids=[3 + 0xF0, 3 + 0x9F], cuts=[], skip=True)
@example(ids=[3 + 0xE2, 3 + 0x41, 3 + 0xFF], cuts=[1], skip=True)
def test_any_byte_fallback_ids_give_the_documented_text(
    metaspace: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    expected = defined(metaspace, ids, skip)
    assert streamed(metaspace, ids, cuts, skip=skip) == expected.removeprefix(" ")
    if "\ufffd" not in expected:
        assert expected.removeprefix(" ") == metaspace.decode(ids, skip_special_tokens=skip)


@MANY
@given(text=st.text(), cuts=CUTS)
@example(text=HARD, cuts=[])
def test_the_ids_of_a_text_give_what_one_decode_gives(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert streamed(tokenizer, ids, cuts) == tokenizer.decode(ids)


@MANY
@given(prompt=st.text(min_size=1), text=st.text(), cuts=CUTS)
@example(prompt="x", text="日本語", cuts=[1])
def test_the_text_after_a_prompt_is_what_the_whole_has_beyond_it(
    tokenizer: Tokenizer, prompt: str, text: str, cuts: list[int]
) -> None:
    head = tokenizer.encode("say: " + prompt)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(head + ids)
    assert tokenizer.decode(head) + streamed(tokenizer, ids, cuts, head) == whole


@MANY
@given(ids=TOKEN_IDS, cuts=CUTS, skip=st.booleans())
def test_a_metaspace_decoder_gives_what_one_decode_gives(
    metaspace_decoder: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    assert streamed(metaspace_decoder, ids, cuts, skip=skip) == metaspace_decoder.decode(ids, skip)


@MANY
@given(ids=st.lists(st.integers(0, 6), max_size=40), cuts=CUTS)
def test_a_wordpiece_decoder_gives_what_one_decode_gives(wordpiece: Tokenizer, ids: list[int], cuts: list[int]) -> None:
    assert streamed(wordpiece, ids, cuts) == wordpiece.decode(ids)


def test_a_wordpiece_continuation_follows_its_prompt(wordpiece: Tokenizer) -> None:
    assert streamed(wordpiece, [2, 5], [1], prompt=[3, 1]) == "ing !"


def test_no_push_ever_splits_a_character(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    parts = [detokenizer.push([i]) for i in tokenizer.encode(HARD, add_special_tokens=False)]
    assert "" in parts
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) == HARD
    assert detokenizer.finish() == ""


def test_the_first_token_after_a_prompt_keeps_its_leading_space(metaspace: Tokenizer) -> None:
    ids = metaspace.encode("fox", add_special_tokens=False)
    assert streamed(metaspace, ids, []) == "fox"
    assert streamed(metaspace, ids, [], prompt=metaspace.encode("the quick")) == " fox"
    assert streamed(metaspace, ids, [], prompt=[1]) == "fox"  # nothing but BOS
    assert streamed(metaspace, ids, [], prompt=[1], skip=False) == " fox"


def test_only_one_leading_space_is_stripped_even_from_bytes(metaspace: Tokenizer) -> None:
    space = 3 + 0x20
    assert streamed(metaspace, [space, space, 3 + 0x41], [1, 2]) == " A"


def test_a_character_begun_in_the_prompt_is_finished_in_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a 👩", add_special_tokens=False)
    assert streamed(tokenizer, ids[-1:], [], prompt=ids[:-1]) == "👩"


def test_a_skipped_special_token_does_not_break_a_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("👩", add_special_tokens=False)
    assert len(ids) > 1
    assert streamed(byte_level, [ids[0], 2, *ids[1:]], []) == "👩"
    assert streamed(byte_level, [ids[0], 2, *ids[1:]], [], skip=False).startswith("\ufffd")


def test_an_unfinished_character_becomes_one_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x👩", add_special_tokens=False)[:-1]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(ids) == "x"
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_an_endless_run_of_undecodable_bytes_neither_raises_nor_stalls_nor_grows(metaspace: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(metaspace)
    for _ in range(20_000):
        assert detokenizer.push([3 + 0x80]) == "\ufffd"
        assert not detokenizer._pending
    for _ in range(20_000):
        detokenizer.push([3 + 0xF0])
        assert len(detokenizer._pending) == 1
    assert detokenizer.finish() == "\ufffd"


def test_an_endless_silence_of_another_decoder_keeps_a_bounded_window(wordpiece: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(wordpiece)
    assert all(detokenizer.push([10**6]) == "" for _ in range(200))
    assert detokenizer.push([3]) == "the"


@pytest.mark.parametrize("token_id", [10**6, 2**31])
def test_an_id_that_no_token_has_adds_nothing_and_is_not_remembered(tokenizer: Tokenizer, token_id: int) -> None:
    table = tokenizer.pieces(True)
    assert table is not None
    assert streamed(tokenizer, [token_id], []) == ""
    assert token_id not in table
