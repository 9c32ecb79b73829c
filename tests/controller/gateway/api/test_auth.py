"""API keys."""

from __future__ import annotations

from typing import Any

import pytest

from lorafleet.controller.gateway.api.auth import ApiKeys
from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.workers.errors import AuthenticationError

KEYS = {"key-1": Tenant("one"), "key-2": Tenant("two")}
CLOSED = ("/v1/models", "/v1/models/tiny", "/metrics", "/version", "/no/such/path")


@pytest.mark.parametrize("header", [None, "", "key-1", "Basic key-1", "Bearer", "Bearer ", "Bearer key-3", "Bearer é"])
def test_an_unknown_key_is_refused(header: str | None) -> None:
    with pytest.raises(AuthenticationError):
        ApiKeys(KEYS).check(header)


@pytest.mark.parametrize("header", ["Bearer key-1", "bearer key-2", "Bearer  key-1 "])
def test_each_of_several_keys_is_accepted(header: str) -> None:
    ApiKeys(KEYS).check(header)


async def test_all_but_the_health_paths_require_a_key(new_fleet: Any) -> None:
    fleet = await new_fleet(api_keys=("key-1", "key-2"))
    wrong = {"Authorization": "Bearer wrong"}
    for path in ("/health", "/ready", "/ping"):
        assert (await fleet.get(path, headers=wrong))[0] == 200
    for path in CLOSED:
        async with fleet.http.get(path, headers=wrong) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert (await response.json())["error"]["code"] == "invalid_api_key"
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert (await fleet.post(path, {}, headers=wrong))[0] == 401
    assert (await fleet.get("/v1/models", headers={"Authorization": "Bearer key-2"}))[0] == 200
    assert (await fleet.openai.completions.create(model="tiny", prompt="a")).choices


async def test_without_keys_none_is_required(fleet: Any) -> None:
    for path in CLOSED[:-1]:
        assert (await fleet.get(path))[0] == 200
