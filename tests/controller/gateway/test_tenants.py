"""Tenants: the file that names them, and the fields that reach the workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.controller.gateway.tenants import Tenant, read_tenants, tenants_of
from lorafleet.workers.errors import ConfigError, InvalidRequestError

SECRET = "sk-very-secret"


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "tenants.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_a_file_names_tenants_by_their_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [
            {"name": "acme", "api_keys": ["k1", "k2"], "weight": 2, "priority": -1},
            {"name": "other", "api_keys": ["k3"]},
        ],
    )
    acme = Tenant("acme", 2.0, -1)
    assert read_tenants(path) == {"k1": acme, "k2": acme, "k3": Tenant("other", 1.0, 0)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[{", "truncated"),
        (b"\xff", "tenants.json"),
        ({}, "Expected `array`"),
        ([], "names no tenant"),
        ([{"api_keys": [SECRET]}], "missing required field `name`"),
        ([{"name": "a"}], "missing required field `api_keys`"),
        ([{"name": "a", "api_keys": [SECRET], "wieght": 2}], "unknown field `wieght`"),
        ([{"name": "a", "api_keys": [SECRET], "weight": "2"}], "Expected `float`"),
        ([{"name": "a", "api_keys": SECRET}], "Expected `array`"),
        ([{"name": "", "api_keys": [SECRET]}], "a name of 0 characters"),
        ([{"name": "a" * 257, "api_keys": [SECRET]}], "a name of 257 characters"),
        ([{"name": "a", "api_keys": []}], "no api_keys"),
        ([{"name": "a", "api_keys": [""]}], "empty"),
        ([{"name": "a", "api_keys": [SECRET + " "]}], "white space"),
        ([{"name": "a", "api_keys": [SECRET]}, {"name": "a", "api_keys": ["k"]}], "'a' is given twice"),
        ([{"name": "a", "api_keys": [SECRET]}, {"name": "b", "api_keys": [SECRET]}], "repeats an earlier"),
        ([{"name": "a", "api_keys": [SECRET], "weight": 0}], "weight is 0.0"),
        ([{"name": "a", "api_keys": [SECRET], "priority": 2147483648}], "priority is 2147483648"),
    ],
)
def test_an_invalid_file_is_refused_without_quoting_a_key(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_tenants(write(tmp_path, content))
    assert said in caught.value.message and "tenants.json" in caught.value.message
    assert SECRET not in caught.value.message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tenants(tmp_path / "missing.json")


def test_each_key_by_itself_is_a_tenant_named_by_its_hash() -> None:
    tenants = tenants_of(["one", "two"], {"three": Tenant("acme")})
    assert tenants["three"] == Tenant("acme")
    names = {tenants["one"].name, tenants["two"].name}
    assert len(names) == 2 and all(len(name) == 12 and name.startswith("key-") for name in names)
    with pytest.raises(ConfigError) as caught:
        tenants_of([SECRET], {SECRET: Tenant("acme")})
    assert SECRET not in caught.value.message


def test_a_requests_priority_adds_to_its_tenants() -> None:
    assert Tenant("a", priority=2).priority_of(None) == 2
    assert Tenant("a", priority=2).priority_of(5) == 7
    assert Tenant(priority=0).priority_of(-5) == -5, "without keys there is no other tenant to overtake"
    with pytest.raises(InvalidRequestError, match="0 or more"):
        Tenant("a", priority=2).priority_of(-5)
    with pytest.raises(InvalidRequestError, match="priority"):
        Tenant("a", priority=2).priority_of(2**31 - 1)


async def test_the_worker_gets_the_owner_of_the_key(new_fleet: Any) -> None:
    fleet = await new_fleet(tenants={"key-a": Tenant("acme", 2.0, 1)}, api_keys=("key-b",))
    for key in ("key-a", "key-b"):
        status, _ = await fleet.post(
            "/v1/completions",
            {"model": "tiny", "prompt": "hello", "max_tokens": 2, "priority": 3},
            headers={"Authorization": f"Bearer {key}"},
        )
        assert status == 200
    acme, other = fleet.worker.generates
    assert (acme.tenant, acme.tenant_weight, acme.priority) == ("acme", 2.0, 4)
    assert other.tenant.startswith("key-") and "key-b" not in str(other)
    assert (other.tenant_weight, other.priority) == (1.0, 3)
    status, _ = await fleet.post(
        "/v1/completions", {"model": "tiny", "prompt": "a"}, headers={"Authorization": "Bearer key-c"}
    )
    assert status == 401


async def test_without_keys_all_are_one_tenant_without_a_name(fleet: Any) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert (await fleet.post("/v1/chat/completions", body))[0] == 200
    status, answer = await fleet.post("/v1/chat/completions", body | {"priority": 2**40})
    assert (status, answer["error"]["param"]) == (400, "priority")
    (generate,) = fleet.worker.generates
    assert (generate.tenant, generate.tenant_weight, generate.priority) == ("", 1.0, 0)
