"""Request ids: the client's, in a header or in the body."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lorafleet.controller.gateway.api.request_id import clean

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-1.2:3_X", "abc-1.2:3_X"),
        ("a b\r\nc: d", "abc:d"),
        ("é\u202e\x00", ""),
        ("x" * 100_000, "x" * 128),
        ("", ""),
    ],
)
def test_an_id_keeps_what_logs_and_headers_can_hold(given: str, kept: str) -> None:
    assert clean(given) == kept


@pytest.mark.parametrize("stream", [False, True])
async def test_the_header_comes_before_the_body_and_both_before_our_own(fleet: Any, stream: bool) -> None:
    for headers, body, wanted in (
        ({"X-Request-Id": "of-header"}, {}, "of-header"),
        ({}, {"request_id": "of-body"}, "of-body"),
        ({"X-Request-Id": "of-header"}, {"request_id": "of-body"}, "of-header"),
        ({"X-Request-Id": "?"}, {"request_id": "of body"}, "ofbody"),
        ({}, {"request_id": "é" * 1000}, None),
        ({}, {"request_id": ""}, None),
        ({}, {"request_id": None}, None),
    ):
        async with fleet.http.post(
            "/v1/chat/completions", json=CHAT | body | {"stream": stream}, headers=headers
        ) as response:
            number = response.headers["x-request-id"]
            assert response.status == 200
            assert wanted is None or number == wanted
            assert number and f'"id":"chatcmpl-{number}"' in (await response.text()).replace(": ", ":")
        assert fleet.worker.generates[-1].request_id == number


async def test_refusals_have_the_bodys_id(fleet: Any) -> None:
    async with fleet.http.post(
        "/v1/chat/completions", json=CHAT | {"request_id": "mine", "model": "nobody"}
    ) as response:
        assert (response.status, response.headers["x-request-id"]) == (404, "mine")


async def test_two_requests_with_one_id_do_not_disturb_each_other(fleet: Any) -> None:
    fleet.worker.permits = 0
    body = CHAT | {"request_id": "same"}
    asked = [
        asyncio.create_task(fleet.post("/v1/chat/completions", body | {"n": num_choices})) for num_choices in (1, 2)
    ]
    await fleet.until(lambda: len(fleet.worker.generates) == 3)
    fleet.worker.permits = None
    answers = await asyncio.gather(*asked)
    assert [(status, len(answer["choices"])) for status, answer in answers] == [(200, 1), (200, 2)]
