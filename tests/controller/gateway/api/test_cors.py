"""Cross-origin requests from browsers: preflights, and the headers of answers."""

from __future__ import annotations

from typing import Any

import pytest

from lorafleet.controller.gateway.cross_origin import CrossOrigin

PAGE = "https://app.example"
PATHS = ("/v1/chat/completions", "/v1/chat/completions/", "/v1/models", "/health", "/no/such/path")
BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 2}


def preflight(origin: str = PAGE, method: str = "POST", headers: str = "authorization,content-type") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": headers,
        "Authorization": "",
    }


def cors_headers(response: Any) -> dict[str, str]:
    return {
        name.lower().removeprefix("access-control-"): value
        for name, value in response.headers.items()
        if name.lower().startswith("access-control-")
    }


@pytest.mark.parametrize("path", PATHS)
async def test_a_preflight_is_answered_without_a_key(new_fleet: Any, path: str) -> None:
    fleet = await new_fleet(api_keys=("key",), cross_origin=CrossOrigin(allowed_origins=(PAGE,)))
    async with fleet.http.options(path, headers=preflight()) as response:
        assert response.status == 204
        assert await response.read() == b""
        found = cors_headers(response)
        assert found["allow-origin"] == PAGE
        assert "POST" in found["allow-methods"]
        assert found["allow-headers"] == "authorization, content-type"
        assert int(found["max-age"]) > 0
        assert "allow-credentials" not in found
        assert response.headers["Vary"] == "Origin"


async def test_what_is_not_allowed_is_refused_and_says_by_which_flag(new_fleet: Any) -> None:
    allowed = CrossOrigin(allowed_origins=(PAGE,), allowed_methods=("POST",), allowed_headers=("authorization",))
    fleet = await new_fleet(api_keys=("key",), cross_origin=allowed)
    for headers, flag in (
        (preflight("https://evil.example"), "--allowed-origins"),
        (preflight("https://app.example.evil"), "--allowed-origins"),
        (preflight(method="DELETE"), "--allowed-methods"),
        (preflight(headers="authorization, x-other"), "--allowed-headers"),
    ):
        async with fleet.http.options(PATHS[0], headers=headers) as response:
            assert response.status == 403
            assert flag in (await response.json())["error"]["message"]
            assert response.headers.get("Access-Control-Allow-Origin") in (None, PAGE)


async def test_without_allowed_origins_nothing_is_allowed_and_no_header_says_so(new_fleet: Any) -> None:
    fleet = await new_fleet(api_keys=("key",))
    async with fleet.http.options(PATHS[0], headers=preflight()) as response:
        assert (response.status, cors_headers(response)) == (403, {})
        assert "--allowed-origins" in (await response.json())["error"]["message"]
    async with fleet.http.get("/v1/models", headers={"Origin": PAGE}) as response:
        assert (response.status, cors_headers(response)) == (200, {})


async def test_a_page_can_read_answers_streams_and_errors(new_fleet: Any) -> None:
    fleet = await new_fleet(api_keys=("key",), cross_origin=CrossOrigin(allowed_origins=("*",)))
    for body, extra, status in (
        (BODY, {}, 200),
        (BODY | {"stream": True}, {}, 200),
        (BODY | {"n": 0}, {}, 400),
        (BODY, {"Authorization": "Bearer wrong"}, 401),
    ):
        async with fleet.http.post("/v1/completions", json=body, headers={"Origin": PAGE, **extra}) as response:
            assert response.status == status
            found = cors_headers(response)
            assert found["allow-origin"] == "*"
            assert "x-request-id" in found["expose-headers"]
            await response.read()


async def test_with_credentials_the_origin_is_named_instead_of_a_star(new_fleet: Any) -> None:
    fleet = await new_fleet(cross_origin=CrossOrigin(allowed_origins=("*",), allow_credentials=True))
    async with fleet.http.get("/v1/models", headers={"Origin": PAGE}) as response:
        found = cors_headers(response)
        assert (found["allow-origin"], found["allow-credentials"]) == (PAGE, "true")
        assert response.headers["Vary"] == "Origin"
    async with fleet.http.get("/v1/models", headers={"Origin": "https://other.example\u00e9"}) as response:
        assert response.status < 500


async def test_other_options_requests_are_no_preflights(new_fleet: Any) -> None:
    fleet = await new_fleet(api_keys=("key",), cross_origin=CrossOrigin(allowed_origins=("*",)))
    async with fleet.http.options(PATHS[0], headers={"Authorization": ""}) as response:
        assert response.status == 401
    async with fleet.http.options(PATHS[0]) as response:
        assert response.status == 405
