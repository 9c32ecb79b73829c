"""Prompts in their four forms, as in a request's body."""

from __future__ import annotations

from typing import Any

import pytest

from lorafleet.controller.gateway.api import prompts as prompts_module
from lorafleet.controller.gateway.api.body import decode_field
from lorafleet.controller.gateway.api.prompts import echoes_of, encode_prompts, read_prompts
from lorafleet.workers.errors import ContextLengthError, InvalidRequestError

CONTEXT = 64


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (b'"hello"', ["hello"]),
        (b'["a", "b, c"]', ["a", "b, c"]),
        (b'["[1,2]"]', ["[1,2]"]),
        (b"[1,2,3]", [[1, 2, 3]]),
        (b"[ 1 , -2 ]", [[1, -2]]),
        (b"[[1],[2,3]]", [[1], [2, 3]]),
        (b"[\n [1],\t[2] ]", [[1], [2]]),
        (b"[" + b",".join([b"1"] * CONTEXT) + b"]", [[1] * CONTEXT]),
        (b"[" + b",".join([b"[1,1]"] * 128) + b"]", [[1, 1]] * 128),
    ],
)
def test_each_form_is_read(raw: bytes, wanted: list[Any]) -> None:
    assert read_prompts(raw, CONTEXT) == wanted


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b'""', "empty"),
        (b"[]", "empty"),
        (b"[ ]", "empty"),
        (b"[[]]", "empty"),
        (b"[[1],[]]", "empty"),
        (b'["a",""]', "empty"),
        (b"null", "null"),
        (b"5", "int"),
        (b"{}", "object"),
        (b'[1,"a"]', "mixes"),
        (b'["a",1]', "mixes"),
        (b'["a",[1]]', "mixes"),
        (b'[[1],"a"]', "prompt[1]"),
        (b"[1,[2]]", "mixes"),
        (b"[1,true]", "bool"),
        (b"[1,null]", "null"),
        (b"[[1],[2,1.5]]", "prompt[1][1]"),
        (b"[" + b",".join([b'"a"'] * 129) + b"]", "129 prompts, the limit is 128"),
        (b"[" + b",".join([b"[1]"] * 129) + b"]", "129 prompts, the limit is 128"),
    ],
)
def test_an_invalid_prompt_is_refused(raw: bytes, part: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_prompts(raw, CONTEXT)
    assert part in caught.value.message
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        (b"[" + b",".join([b"1"] * (CONTEXT + 1)) + b"]", "prompt has 65 token ids"),
        (b"[" + b"1," * 1_000_000 + b"1]", "prompt has 1000001 token ids"),
        (b"[[1],[" + b"1," * 500 + b"1]]", "prompt[1] has 501 token ids"),
    ],
)
def test_more_ids_than_the_context_has_are_counted_and_not_decoded(
    raw: bytes, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = []

    def watch(raw: bytes, kind: Any, name: str) -> Any:
        num_bytes.append(len(raw) if kind == list[int] else 0)
        return decode_field(raw, kind, name)

    monkeypatch.setattr(prompts_module, "decode_field", watch)
    with pytest.raises(ContextLengthError) as caught:
        read_prompts(raw, CONTEXT)
    assert where in caught.value.message
    assert caught.value.param == "prompt"
    assert sum(num_bytes) < 10


def test_texts_are_encoded_and_ids_stay(tokenizer: Any) -> None:
    assert encode_prompts(tokenizer, ["hello", "world"], True, CONTEXT) == [
        tokenizer.encode("hello"),
        tokenizer.encode("world"),
    ]
    assert encode_prompts(tokenizer, [[1, 2]], True, CONTEXT) == [[1, 2]]


def test_what_is_echoed_is_bounded_over_all_choices(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert echoes_of(tokenizer, ["a", "b"], 2) == ["a", "a", "b", "b"]
    assert echoes_of(tokenizer, [tokenizer.encode("hello world")], 1) == ["hello world"]
    monkeypatch.setattr(prompts_module, "MAX_ECHO_CHARS", 10)
    with pytest.raises(InvalidRequestError, match="12 characters") as caught:
        echoes_of(tokenizer, ["abcdef"], 2)
    assert caught.value.param == "echo"
