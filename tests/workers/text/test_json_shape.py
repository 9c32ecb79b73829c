"""Counts of a JSON text's values, compared with a decoder's."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.text import json_shape
from lorafleet.workers.text.json_shape import MAX_CONTAINERS, MAX_DEPTH, MAX_STRINGS, MAX_VALUES, check_shape

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\[]{},\n\u00e9'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='k"\\{,'), inner, max_size=4),
    max_leaves=30,
)


def _depth(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(_depth, parts), default=0)


def _num(value: Any, kind: type | tuple[type, ...]) -> int:
    keys = list(value) if isinstance(value, dict) else []
    parts = [*keys, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return isinstance(value, kind) + sum(_num(part, kind) for part in parts)


@given(JSON, st.booleans(), st.integers(2, 9))
def test_what_is_counted_is_what_a_decoder_makes(value: Any, ascii_only: bool, slice_bytes: int) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_shape, "_SLICE_BYTES", slice_bytes)
        for name, number in (
            ("MAX_DEPTH", _depth(value)),
            ("MAX_STRINGS", _num(value, str)),
            ("MAX_CONTAINERS", _num(value, (dict, list))),
        ):
            for limit in (number, max(number - 1, 0)):
                with pytest.MonkeyPatch.context() as change:
                    change.setattr(json_shape, name, limit)
                    with pytest.raises(InvalidRequestError) if number > limit else contextlib.nullcontext():
                        check_shape(text, "It")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"[" * 600 + b"]" * 600, f"nested 600 deep; the limit is {MAX_DEPTH}"),
        (b"[" * 50_000, "nested 50000 deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested 65 deep"),
        (b"[" + b"{}," * 100_000 + b"{}]", f"100002 objects and lists; the limit is {MAX_CONTAINERS}"),
        (b"[" * 1_000_000, "1000000 objects and lists"),
        (b"[" + b'"",' * 100_000 + b'""]', f"100001 strings; the limit is {MAX_STRINGS}"),
        (b"[" + b"1," * 2_000_000 + b"1]", f"2000001 values; the limit is {MAX_VALUES}"),
    ],
)
def test_too_much_is_refused_with_the_limit(text: bytes, part: str) -> None:
    with pytest.raises(InvalidRequestError, match=part) as caught:
        check_shape(text, "The body", param="messages")
    assert caught.value.param == "messages"
    assert caught.value.message.startswith("The body ")


@pytest.mark.parametrize(
    "text",
    [
        b'"' + b"[{," * 200_000 + b'"',  # all of it is one string
        b'{"prompt":"' + rb"\"[{\\" * 200_000 + b'"}',
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        b"[" + b"1," * 1_000_000 + b"1]",
        b"",
        b"\\" * 3_000_001,
    ],
)
def test_what_a_request_may_hold_passes(text: bytes) -> None:
    check_shape(text, "The body")
