"""Stop strings, against a definition by brute force."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.text import StopMatcher

MANY = settings(deadline=None, max_examples=1000)
AB = st.text(alphabet="ab", max_size=20)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def by_brute_force(text: str, stops: list[str], include: bool, num_immune: int = 0) -> tuple[str, str | None]:
    """Check every prefix of the text: the first that ends in a stop string, and the longest such stop string."""
    for end in range(num_immune + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def chunks(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [text[begin:end] for begin, end in pairwise(ends)]


@MANY
@given(text=AB, stops=STOPS, cuts=st.lists(st.integers(0, 20)), include=st.booleans())
def test_every_chunking_releases_what_the_definition_says(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopMatcher(stops, include_stop_str_in_output=include)
    released, matched = "", None
    for chunk in chunks(text, cuts):
        part, matched = matcher.push(chunk)
        released += part
        if matched is not None:
            break
    assert (released + matcher.finish(), matched) == by_brute_force(text, stops, include)


@MANY
@given(text=AB, stops=STOPS)
def test_what_is_held_back_is_the_longest_end_that_begins_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    released, matched = matcher.push(text)
    if matched is None:
        ends = (text[begin:] for begin in range(len(text) + 1))
        expected = next(end for end in ends if not end or any(stop.startswith(end) for stop in stops))
        assert matcher.finish() == expected
        assert released + expected == text


@MANY
@given(quiet=AB, text=AB, stops=STOPS, cuts=st.lists(st.integers(0, 20)))
def test_no_match_ends_in_text_that_is_not_matchable(quiet: str, text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    released, matched = "", None
    for chunk in chunks(quiet, cuts):
        part, matched = matcher.push(chunk, matchable=False)
        assert matched is None
        released += part
    for chunk in chunks(text, cuts):
        part, matched = matcher.push(chunk)
        released += part
        if matched is not None:
            break
    expected, stop = by_brute_force(quiet + text, stops, False, num_immune=len(quiet))
    # Text released before it became matchable stays released.
    assert matched == stop
    assert released + matcher.finish() == expected


def test_a_stop_string_across_pushes_is_found_and_never_shown() -> None:
    matcher = StopMatcher(["</end>"])
    assert [matcher.push(part) for part in ["say <", "/e", "nd", "> more"]] == [
        ("say ", None),
        ("", None),
        ("", None),
        ("", "</end>"),
    ]
    assert matcher.finish() == ""


def test_text_that_only_looked_like_a_stop_string_is_released() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.push("a </en") == ("a ", None)
    assert matcher.push("tity") == ("</entity", None)
    assert matcher.push(" <") == (" ", None)
    assert matcher.finish() == "<"


def test_the_stop_string_is_included_on_request_and_nothing_after_it() -> None:
    assert StopMatcher(["b"], include_stop_str_in_output=True).push("abc") == ("ab", "b")


def test_the_first_to_be_complete_wins_whatever_the_order_of_the_list() -> None:
    for stops in (["bcde", "cd"], ["cd", "bcde"]):
        assert StopMatcher(stops).push("abcdef") == ("ab", "cd")


def test_of_those_complete_at_once_the_longest_wins() -> None:
    for stops in (["\n", "\n\n"], ["\n\n", "\n"]):
        assert StopMatcher(stops).push("a\n\n") == ("a", "\n")  # "\n" was complete a character earlier
    for stops in (["d", "bcd"], ["bcd", "d"]):
        assert StopMatcher(stops).push("abcd") == ("a", "bcd")


def test_nothing_is_released_after_a_match() -> None:
    matcher = StopMatcher(["x"])
    matcher.push("ax")
    assert matcher.push("more") == ("", "x")
    assert matcher.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="must not be empty") as caught:
        StopMatcher(["a", ""])
    assert caught.value.param == "stop"
