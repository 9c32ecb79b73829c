"""Whatever endpoint a body is for, it comes in by the same door."""

from __future__ import annotations

from typing import Any

import pytest

from lorafleet.controller.gateway.api.app import make_app

ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
PATHS = ("/v1/completions", "/v1/chat/completions", *ADMIN, "/tokenize", "/detokenize")
JSON = {"Content-Type": "application/json"}
KEYS = {"api_keys": ("first", "second")}  # the first is an administrator's, as there is no other


async def refusals(fleet: Any, paths: tuple[str, ...], body: bytes, headers: dict[str, str]) -> set[tuple[int, str]]:
    """(status, message) of each path's answer."""
    answers = [await fleet.post(path, body, headers=headers) for path in paths]
    return {(status, answer["error"]["message"]) for status, answer in answers}


async def test_these_are_all_endpoints_with_a_body(fleet: Any) -> None:
    routes = make_app(fleet.state).router.routes()
    posted = {route.resource.canonical for route in routes if route.method == "POST" and route.resource is not None}
    assert {path.rstrip("/") for path in posted} == set(PATHS)


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b"{}", {"Content-Type": "text/plain"}, 400, "Content-Type"),
        (b"{}", JSON | {"Content-Encoding": "br"}, 400, "Content-Encoding"),
        (b"{", JSON, 400, "JSON"),
        (b"\xff", JSON, 400, ""),
        (b'{"a":' * 500 + b"1" + b"}" * 500, JSON, 400, "nest"),
        (b'{"nobody_knows_it": 1}', JSON, 400, "is not a known field"),  # with --strict-fields
        (b" " * 5000, JSON, 413, "--max-body-bytes"),
    ],
    ids=["type", "encoding", "half", "no text", "deep", "unknown field", "large"],
)
async def test_all_refuse_a_body_in_the_same_words(
    new_fleet: Any, body: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    fleet = await new_fleet(max_body_bytes=4096, strict_fields=True)
    ((answered, message),) = await refusals(fleet, PATHS, body, headers)
    assert answered == status
    assert said in message


async def test_all_ask_for_a_key(new_fleet: Any) -> None:
    fleet = await new_fleet(**KEYS)
    ((status, _),) = await refusals(fleet, PATHS, b"{}", JSON | {"Authorization": "Bearer wrong"})
    assert status == 401


async def test_only_administrators_come_in_where_adapters_are_changed(new_fleet: Any) -> None:
    fleet = await new_fleet(**KEYS)
    headers = JSON | {"Authorization": "Bearer second"}
    ((status, _),) = await refusals(fleet, ADMIN, b"no JSON", headers)
    assert status == 403, "before the body is looked at"
    others = tuple(path for path in PATHS if path not in ADMIN)
    assert {status for status, _ in await refusals(fleet, others, b"no JSON", headers)} == {400}


async def test_none_takes_a_request_while_the_gateway_drains(fleet: Any) -> None:
    fleet.state.intake.draining = True
    ((status, message),) = await refusals(fleet, PATHS, b"{}", JSON)
    assert status == 503
    assert "shutting down" in message


async def test_a_place_is_given_back_whatever_comes_of_the_request(fleet: Any) -> None:
    await refusals(fleet, PATHS, b"{", JSON)
    assert (await fleet.post("/tokenize", {"prompt": "hello"}))[0] == 200
    assert fleet.state.intake.num_in_flight == 0
    assert await fleet.state.intake.idle(0.0)
