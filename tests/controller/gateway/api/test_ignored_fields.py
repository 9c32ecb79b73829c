"""The names of ignored fields, in a header and in the log."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from lorafleet.controller.gateway.api.ignored_fields import HEADER, MAX_NAMES, IgnoredFields

BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 2}


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a", "stream_options.b", "c-d_E9"], "a, stream_options.b, c-d_E9"),
        (["a b", "x\r\nset-cookie: y", "\u202e", ""], "a?b, x??set-cookie??y, ?, ?"),
        (["n" * 100_000], "n" * 64),
        (["f"] * (MAX_NAMES + 4), ", ".join(["f"] * MAX_NAMES) + ", and 4 more"),
    ],
)
def test_the_header_is_short_and_safe(names: list[str], text: str) -> None:
    assert IgnoredFields().text(names) == text


def test_each_name_is_logged_once_and_no_more_than_a_bound(caplog: pytest.LogCaptureFixture) -> None:
    fields = IgnoredFields(max_logged=5)
    fields.text(["a", "b", "a"])
    fields.text(["b", "a"])
    fields.text(["c"])
    assert [record.args for record in caplog.records] == [("a, b",), ("c",)]
    for number in range(100):
        fields.text([f"made-up-{number}"])
    assert [record.args for record in caplog.records][2:] == [("made-up-0",), ("made-up-1",), (5,)]
    fields.text(["a", "another"])
    assert len(caplog.records) == 5
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_names_what_it_ignores(fleet: Any, path: str, stream: bool) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    body: dict[str, Any] = chat if "chat" in path else {"prompt": "hello"} if path == "/tokenize" else dict(BODY)
    body = body | ({"stream": True} if stream and path != "/tokenize" else {})
    for extra, names in ({}, None), ({"x_one": 1, "x two": "2"}, "x_one, x?two"):
        async with fleet.http.post(path, json=body | extra) as response:
            assert response.status == 200, await response.text()
            assert response.headers.get(HEADER) == names
            assert response.headers["x-request-id"]
            await response.read()


async def test_refusals_name_it_too(fleet: Any) -> None:
    async with fleet.http.post("/v1/completions", json=BODY | {"model": "nobody", "x_one": 1}) as response:
        assert (response.status, response.headers[HEADER]) == (404, "x_one")


async def test_thousands_of_made_up_fields_make_a_short_header(fleet: Any) -> None:
    body = BODY | {f"field-{number}-{'x' * 100}": number for number in range(5000)}
    async with fleet.http.post("/v1/completions", json=body) as response:
        assert response.status == 200
        assert len(response.headers[HEADER]) < 1200
        assert response.headers[HEADER].endswith("and 4984 more")


async def test_strict_fields_refuse_them(new_fleet: Any) -> None:
    fleet = await new_fleet(strict_fields=True)
    for extra, name in ({"x_one": 1}, "x_one"), ({"store": True}, "store"):
        status, answer = await fleet.post("/v1/completions", BODY | extra)
        assert (status, answer["error"]["param"]) == (400, name)
        assert name in json.dumps(answer)
    assert fleet.worker.generates == []
    assert (await fleet.post("/v1/completions", BODY | {"user": "u"}))[0] == 200
