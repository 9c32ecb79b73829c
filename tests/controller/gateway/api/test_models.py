"""GET /v1/models, /tokenize, /detokenize, /version."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import openai
import pytest

HI = [{"role": "user", "content": "hello"}]


async def test_the_base_model_and_its_adapters_are_listed(fleet: Any) -> None:
    models = [model async for model in fleet.openai.models.list()]
    assert [model.id for model in models] == ["tiny", "tiny-alias", "org/pirate", "sql-adapter"]
    assert [model.parent for model in models] == [None, None, "tiny", "tiny"]
    assert models[2].root == "/adapters/org/pirate"
    assert {model.object for model in models} == {"model"}
    assert [model.created for model in models] == [1_700_000_000] * 2 + [1_700_000_001] * 2
    assert {model.owned_by for model in models} == {"lorafleet"}


async def test_a_model_with_a_slash_in_its_name_is_found(fleet: Any) -> None:
    assert json.loads((await fleet.get("/v1/models/org/pirate"))[1])["id"] == "org/pirate"
    assert (await fleet.openai.models.retrieve("org/pirate")).id == "org/pirate"
    with pytest.raises(openai.NotFoundError, match="org/pirate"):
        await fleet.openai.models.retrieve("org/pirat")


async def test_a_new_table_changes_the_list(fleet: Any) -> None:
    fleet.controller.table.adapters.add(name="late", digest="d-late", version=1, parent="tiny")
    fleet.controller.publish()
    await fleet.until(lambda: "late" in fleet.state.table.models)
    assert "late" in [model.id async for model in fleet.openai.models.list()]


async def test_an_adapter_that_no_worker_has_now_is_listed_with_the_reason(fleet: Any) -> None:
    fleet.controller.table.workers[0].lacking.add(name="sql-adapter", digest="d-sql", reason="missing_directory")
    fleet.controller.publish()
    await fleet.until(lambda: fleet.state.table.unavailable("d-sql"))
    cards = {card["id"]: card for card in json.loads((await fleet.get("/v1/models"))[1])["data"]}
    assert cards["sql-adapter"]["unavailable"] == "missing_directory"
    assert "unavailable" not in cards["org/pirate"] and "unavailable" not in cards["tiny"]


async def test_tokenize_and_detokenize_are_each_others_reverse(fleet: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("hello world")
    status, answer = await fleet.post(
        "/tokenize", {"model": "tiny", "prompt": "hello world", "return_token_strs": True}
    )
    assert status == 200
    assert answer["tokens"] == ids
    assert answer["count"] == len(ids)
    assert answer["max_model_len"] == 64
    assert answer["token_strs"] == [tokenizer.id_to_token(token_id) for token_id in ids]
    assert await fleet.post("/detokenize", {"model": "tiny", "tokens": ids}) == (200, {"prompt": "hello world"})


async def test_messages_are_tokenized_through_the_template(fleet: Any) -> None:
    _, answer = await fleet.post("/tokenize", {"messages": HI, "add_generation_prompt": False})
    _, text = await fleet.post("/detokenize", {"tokens": answer["tokens"]})
    assert text["prompt"] == "<|im_start|>user\nhello<|im_end|>\n"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "nothing"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
    ],
)
async def test_bad_input_is_named(fleet: Any, path: str, body: Any, status: int, param: str) -> None:
    got, answer = await fleet.post(path, body)
    assert (got, answer["error"]["param"]) == (status, param)


async def test_the_version_is_the_packages(fleet: Any) -> None:
    assert json.loads((await fleet.get("/version"))[1]) == {"version": version("lorafleet")}
