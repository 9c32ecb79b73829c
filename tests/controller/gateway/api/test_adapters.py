"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, called like vLLM's clients do."""

from __future__ import annotations

from typing import Any

import pytest

from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.proto import worker_pb2

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


async def text(fleet: Any, path: str, body: dict[str, Any]) -> tuple[int, str, Any]:
    async with fleet.http.post(path, json=body) as response:
        return response.status, await response.text(), response.headers


async def test_a_loaded_adapter_answers_the_very_next_request(fleet: Any) -> None:
    status, said, _ = await text(fleet, LOAD, {"lora_name": "new", "lora_path": "/adapters/new"})
    assert (status, said) == (200, "Success: LoRA adapter 'new' added successfully.")
    (load,) = fleet.controller.loads
    assert (load.name, load.root, load.load_inplace) == ("new", "/adapters/new", False)
    answer = await fleet.openai.completions.create(model="new", prompt="hello", max_tokens=2)
    assert answer.model == "new"
    assert fleet.worker.generates[-1].adapter_digest == "new"


async def test_an_unloaded_adapter_is_gone_for_the_very_next_request(fleet: Any) -> None:
    status, said, headers = await text(fleet, UNLOAD, {"lora_name": "sql-adapter"})
    assert (status, said) == (200, "Success: LoRA adapter 'sql-adapter' removed successfully.")
    assert headers["x-lorafleet-freed-device-bytes"] == "1000"
    assert headers["x-lorafleet-freed-host-bytes"] == "300"
    assert headers["x-lorafleet-draining-workers"] == "1"
    status, answer = await fleet.post("/v1/completions", {"model": "sql-adapter", "prompt": "hello"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


async def test_the_fields_of_a_load_are_passed_on(fleet: Any) -> None:
    body = {"lora_name": "new", "lora_path": "x", "load_inplace": True, "is_3d_lora_weight": False}
    await text(fleet, LOAD, body | {"weight": 3, "pin": True})
    await text(fleet, LOAD, {"lora_name": "plain", "lora_path": "x"})
    await text(fleet, LOAD, {"lora_name": "zero", "lora_path": "x", "weight": 0})
    full, plain, zero = fleet.controller.loads
    assert (full.load_inplace, full.weight, full.pin) == (True, 3.0, True)
    assert (plain.load_inplace, plain.weight, plain.pin) == (False, 1.0, False)
    assert (zero.HasField("weight"), zero.weight) == (True, 0.0)  # for the controller to refuse


async def test_an_adapters_share_and_vocabulary_are_those_of_the_table(fleet: Any, tokenizer: Any) -> None:
    added = tokenizer.vocab_size
    fleet.controller.table.adapters.add(name="wide", digest="d-wide", version=1, weight=2.5, vocab_size=added + 2)
    fleet.controller.publish()
    await fleet.until(lambda: "wide" in fleet.state.table.models)
    body = {"prompt": [5, added + 1], "max_tokens": 1, "stop_token_ids": [added]}
    assert (await fleet.post("/v1/completions", body | {"model": "wide"}))[0] == 200
    assert fleet.worker.generates[-1].adapter_weight == 2.5
    status, answer = await fleet.post("/v1/completions", body | {"model": "sql-adapter"})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert (await fleet.post("/v1/completions", {"model": "tiny", "prompt": "hello", "max_tokens": 1}))[0] == 200
    assert fleet.worker.generates[-1].adapter_weight == 1.0
    assert (await fleet.post("/detokenize", {"model": "tiny", "tokens": [added + 1]}))[0] == 400


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (LOAD, {"lora_name": "new"}, "lora_path"),
        (LOAD, {"lora_path": "/x"}, "lora_name"),
        (LOAD, {"lora_name": "new", "lora_path": "/x", "load_inplace": "yes"}, "load_inplace"),
        (LOAD, {"lora_name": "new", "lora_path": "/x", "is_3d_lora_weight": True}, "is_3d_lora_weight"),
        (UNLOAD, {}, "lora_name"),
        (UNLOAD, {"lora_name": "sql-adapter", "lora_int_id": 3}, "lora_int_id"),
    ],
)
async def test_a_body_that_does_not_fit_names_its_field(
    path: str, body: dict[str, Any], param: str, fleet: Any
) -> None:
    status, answer = await fleet.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("code", "reason", "status"),
    [("adapter_conflict", "", 409), ("adapter_refused", "rank_too_large", 422), ("model_not_found", "", 404)],
)
async def test_a_refusal_by_the_controller_keeps_its_status(code: str, reason: str, status: int, fleet: Any) -> None:
    fleet.controller.update_failure = worker_pb2.Failure(code=code, message="Because.", reason=reason)
    for path, body in ((LOAD, {"lora_name": "new", "lora_path": "/x"}), (UNLOAD, {"lora_name": "new"})):
        got, answer = await fleet.post(path, body)
        assert (got, answer["error"]["code"], answer["error"]["message"]) == (status, code, "Because.")
        assert answer["error"].get("reason", "") == reason


async def test_without_its_controller_nothing_changes_and_the_answer_says_so(fleet: Any) -> None:
    await fleet.controller.kill()
    status, answer = await fleet.post(LOAD, {"lora_name": "new", "lora_path": "/x"})
    assert (status, answer["error"]["code"]) == (503, "no_worker")
    assert (await fleet.openai.completions.create(model="sql-adapter", prompt="hello", max_tokens=2)).choices


@pytest.mark.parametrize(
    ("options", "allowed", "refused"),
    [
        ({"api_keys": ("k1", "k2")}, ["k1"], ["k2"]),
        ({"tenants": {"t1": Tenant("a"), "t2": Tenant("b")}}, ["t1"], ["t2"]),
        ({"tenants": {"t1": Tenant("a")}, "api_keys": ("k1",)}, ["k1"], ["t1"]),
        ({"api_keys": ("k1", "k2"), "admin_api_keys": ("root", "k2")}, ["root", "k2"], ["k1"]),
        ({"admin_api_keys": ("root",)}, ["root"], ["none", ""]),
    ],
    ids=["the first key", "the first of the file", "the first of both", "administrators'", "administrators' alone"],
)
async def test_only_an_administrators_key_changes_what_is_served(
    options: dict[str, Any], allowed: list[str], refused: list[str], new_fleet: Any
) -> None:
    fleet = await new_fleet(**options)
    bodies = ((LOAD, {"lora_name": "new", "lora_path": "/adapters/new"}), (UNLOAD, {"lora_name": "sql-adapter"}))
    for key in refused:
        for path, body in bodies:
            headers = {"Authorization": f"Bearer {key}"} if key else {"Authorization": ""}
            status, answer = await fleet.post(path, body, headers=headers)
            assert (status, answer["error"]["code"]) == (403, "permission_denied")
            assert (await fleet.get("/v1/models", headers=headers))[0] == 200
    assert not fleet.controller.loads
    for key in allowed:
        for path, body in bodies:
            async with fleet.http.post(path, json=body, headers={"Authorization": f"Bearer {key}"}) as response:
                assert response.status == 200
