"""Tokens to text that is safe to send, and the count of tokens that belong to it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.workers.text import Delta, OutputText, Tokenizer


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return one token per character, so that positions are obvious."""
    return [tokenizer.encode(char, add_special_tokens=False)[0] for char in text]


def test_without_stop_strings_everything_is_text(tokenizer: Tokenizer) -> None:
    text = "日本語 and 👩‍👩‍👧‍👦"
    ids = tokenizer.encode(text, add_special_tokens=False)
    output = OutputText(tokenizer)
    deltas = [output.push(ids[:5]), output.push(ids[5:], finished=True)]
    assert "".join(delta.text for delta in deltas) == text
    assert [delta.num_tokens_used for delta in deltas] == [5, len(ids) - 5]
    assert all(delta.stop_reason is None for delta in deltas)


def test_the_token_that_completes_a_stop_string_is_the_last_one_used(byte_level: Tokenizer) -> None:
    output = OutputText(byte_level, stop=["cd"])
    assert output.push(ids_of(byte_level, "abcdefg")) == Delta("ab", "cd", 4)
    assert output.push(ids_of(byte_level, "xyz"), finished=True) == Delta("", "cd", 0)


def test_a_stop_string_that_ends_in_a_later_push_is_counted_in_that_push(byte_level: Tokenizer) -> None:
    output = OutputText(byte_level, stop=["cd"], include_stop_str_in_output=True)
    assert output.push(ids_of(byte_level, "abc")) == Delta("ab", None, 3)
    assert output.push(ids_of(byte_level, "de")) == Delta("cd", "cd", 1)


def test_what_was_held_back_is_released_when_finished(byte_level: Tokenizer) -> None:
    output = OutputText(byte_level, stop=["cd"])
    assert output.push(ids_of(byte_level, "abc")) == Delta("ab", None, 3)
    assert output.push([], finished=True) == Delta("c", None, 0)


def test_an_unfinished_character_is_released_when_finished(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("👩", add_special_tokens=False)[:1]
    for stop in ([], ["x"]):
        output = OutputText(byte_level, stop=stop)
        assert output.push(ids, finished=True) == Delta("\ufffd", None, 1)


def test_the_first_min_tokens_complete_no_stop_string(byte_level: Tokenizer) -> None:
    output = OutputText(byte_level, stop=["b"], min_tokens=3)
    assert output.push(ids_of(byte_level, "abbab")) == Delta("abba", "b", 5)


def test_a_stop_string_may_begin_in_the_first_min_tokens(byte_level: Tokenizer) -> None:
    output = OutputText(byte_level, stop=["bc"], min_tokens=2)
    assert output.push(ids_of(byte_level, "ab")) == Delta("a", None, 2)
    assert output.push(ids_of(byte_level, "cd")) == Delta("", "bc", 1)


def test_a_stop_token_is_counted_and_not_shown(byte_level: Tokenizer) -> None:
    for stop in ([], ["x"]):
        output = OutputText(byte_level, stop=stop)
        assert output.push(ids_of(byte_level, "ab!"), finished=True, hide_last=True) == Delta("ab", None, 3)


def test_special_tokens_are_shown_on_request(byte_level: Tokenizer) -> None:
    for skip, text in ((True, "a"), (False, "a<|im_end|>")):
        output = OutputText(byte_level, stop=["zzz"], skip_special_tokens=skip)
        assert output.push([*ids_of(byte_level, "a"), 2], finished=True).text == text


def test_a_continuation_of_a_prompt_keeps_its_space(metaspace: Tokenizer) -> None:
    output = OutputText(metaspace, metaspace.encode("the"), stop=["!"])
    assert output.push(metaspace.encode("fox", add_special_tokens=False), finished=True).text == " fox"


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(alphabet="abcé👩", max_size=30),
    stop=st.lists(st.text(alphabet="abcé👩", min_size=1, max_size=3), min_size=1, max_size=3),
    size=st.integers(1, 7),
    min_tokens=st.integers(0, 8),
)
def test_the_size_of_pushes_changes_nothing(
    byte_level: Tokenizer, text: str, stop: list[str], size: int, min_tokens: int
) -> None:
    ids = byte_level.encode(text)

    def outcome(step: int) -> tuple[str, str | None, int]:
        output = OutputText(byte_level, stop=stop, min_tokens=min_tokens)
        released, reason, used = "", None, 0
        for begin in range(0, len(ids) or 1, step):
            delta = output.push(ids[begin : begin + step], finished=begin + step >= len(ids))
            released, reason, used = released + delta.text, delta.stop_reason, used + delta.num_tokens_used
        return released, reason, used

    assert outcome(size) == outcome(1)
    if min_tokens == 0:
        released, reason, used = outcome(1)
        assert not any(string in released for string in stop)
        assert (reason is None) == (not any(string in text for string in stop))
        assert reason is None or byte_level.decode(ids[:used]).startswith(released + reason)
