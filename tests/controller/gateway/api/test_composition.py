"""Several adapters in one request: both ways to write them, and every refusal."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

SQL, PIRATE = "sql-adapter", "org/pirate"
BODY = {"prompt": "hello world", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def adapters(*parts: tuple[str, float | None]) -> dict[str, Any]:
    """Return the field, with the base model's name. None: without a weight."""
    return {
        "model": "tiny",
        "adapters": [{"name": name} | ({} if weight is None else {"weight": weight}) for name, weight in parts],
    }


def sent(fleet: Any) -> tuple[str, list[tuple[str, float]]]:
    """(adapter, composition in the order of digests) of the last request that a worker got."""
    generate = fleet.worker.generates[-1]
    return generate.adapter_digest, [(part.digest, part.weight) for part in generate.composition]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (adapters((SQL, 0.7), (PIRATE, 0.3)), [("d-pirate", 0.3), ("d-sql", 0.7)]),
        (adapters((PIRATE, 2), (SQL, -0.5)), [("d-pirate", 2.0), ("d-sql", -0.5)]),
        (adapters((SQL, None), (PIRATE, 0.0)), [("d-pirate", 0.0), ("d-sql", 1.0)]),
        (adapters((SQL, 0.5)), [("d-sql", 0.5)]),
        (adapters((SQL, 1.0)), "d-sql"),
        (adapters((SQL, None)) | {"model": "tiny-alias"}, "d-sql"),
        ({"model": f"{SQL}:0.7+{PIRATE}:0.3"}, [("d-pirate", 0.3), ("d-sql", 0.7)]),
        ({"model": f"{SQL}+{PIRATE}"}, [("d-pirate", 1.0), ("d-sql", 1.0)]),
        ({"model": f"{SQL}:-.5+{PIRATE}:1e-2"}, [("d-pirate", 0.01), ("d-sql", -0.5)]),
        ({"model": f"{SQL}:0.5"}, [("d-sql", 0.5)]),
        ({"model": f"{SQL}:1"}, "d-sql"),
        ({"model": SQL, "adapters": None}, "d-sql"),
        ({"model": "tiny", "adapters": None}, ""),
    ],
    ids=str,
)
async def test_both_ways_to_name_several_adapters_say_the_same(fleet: Any, body: dict[str, Any], expected: Any) -> None:
    for path, rest in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
        status, answer = await fleet.post(path, rest | body)
        assert status == 200, answer
        assert answer["model"] == body["model"]
        assert sent(fleet) == ((expected, []) if isinstance(expected, str) else ("", expected))


async def test_a_model_of_that_very_name_is_not_parsed(fleet: Any) -> None:
    names = {f"{SQL}+{PIRATE}": "d-plus", f"{SQL}:0.5": "d-colon", "a+b": "d-ab"}
    for name, digest in names.items():
        fleet.controller.table.adapters.add(name=name, digest=digest, version=1, parent="tiny")
    fleet.controller.publish()
    await fleet.until(lambda: "a+b" in fleet.state.table.models)
    for name, digest in names.items():
        status, _ = await fleet.post("/v1/completions", BODY | {"model": name})
        assert (status, sent(fleet)) == (200, (digest, []))
    status, _ = await fleet.post("/v1/completions", BODY | {"model": f"{SQL}:0.5+{PIRATE}:0.25"})
    assert (status, sent(fleet)) == (200, ("", [("d-colon", 1.0), ("d-pirate", 0.25)]))
    status, _ = await fleet.post("/v1/completions", BODY | adapters(("a+b", 0.5), (SQL, 0.5)))
    assert (status, sent(fleet)) == (200, ("", [("d-ab", 0.5), ("d-sql", 0.5)]))


@pytest.mark.parametrize(
    ("body", "status", "param", "part"),
    [
        (adapters(), 400, "adapters", "names 0 adapters; 1 to 2"),
        (adapters((SQL, 1.0), (PIRATE, 1.0), ("third", 1.0)), 400, "adapters", "names 3 adapters; 1 to 2"),
        (adapters((SQL, 0.5), (SQL, 0.5)), 400, "adapters", f"names '{SQL}' twice"),
        (adapters((SQL, 0.5), ("alias", 0.5)), 400, "adapters", f"'alias' twice (as '{SQL}'"),
        (adapters((SQL, 100.5), (PIRATE, 1.0)), 400, "adapters", f"weight of '{SQL}' is 100.5"),
        (adapters((SQL, -101.0)), 400, "adapters", "between -100 and 100"),
        (adapters((SQL, 1.0), ("tiny", 1.0)), 400, "adapters", "'tiny', the base model"),
        (adapters((SQL, 1.0), ("org/pirat", 1.0)), 404, "adapters", "no model 'org/pirat'. Did you mean 'org/pirate'"),
        (adapters((SQL, 1.0)) | {"model": PIRATE}, 400, "model", "must be the base model, 'tiny'"),
        (adapters((SQL, 1.0)) | {"model": "tinny"}, 404, "model", "no model 'tinny'"),
        ({"model": "tiny", "adapters": [{"weight": 1.0}]}, 400, "adapters", "`name`"),
        ({"model": "tiny", "adapters": [{"name": SQL, "wait": 1.0}]}, 400, "adapters", "`wait`"),
        ({"model": "tiny", "adapters": [{"name": SQL, "weight": "1"}]}, 400, "adapters", "weight"),
        ({"model": "tiny", "adapters": SQL}, 400, "adapters", "array"),
        (adapters((SQL, 0.5), ("dora", 0.5)), 422, "adapters", "'dora' has DoRA"),
        (adapters(("dora", 0.5)), 422, "adapters", "'dora' has DoRA"),
        (adapters((SQL, 0.5), ("own", 0.5)), 422, "adapters", "different tokenizers"),
        ({"model": f"{SQL}+{PIRATE}+{SQL}"}, 400, "model", "names 3 adapters"),
        ({"model": f"{SQL}:0.5+{SQL}:0.5"}, 400, "model", "twice"),
        ({"model": f"{SQL}:1000"}, 400, "model", "is 1000; it must be between"),
        ({"model": f"{SQL}:1e999+{PIRATE}"}, 400, "model", "is inf"),
        ({"model": f"{SQL}+tiny"}, 400, "model", "the base model"),
        ({"model": f"{SQL}+org/pirat:0.5"}, 404, "model", "no model 'org/pirat'. Did you mean 'org/pirate'"),
        ({"model": f"{SQL}:nan+{PIRATE}"}, 404, "model", f"no model '{SQL}:nan'"),
        ({"model": "unknown:0.5+other"}, 404, "model", "no model 'unknown:0.5+other'"),
        ({"model": f"{SQL}+"}, 404, "model", "no model ''"),
        ({"model": "+"}, 404, "model", "no model '+'"),
        ({"model": f"{SQL}:0.5+dora"}, 422, "model", "'dora' has DoRA"),
    ],
    ids=str,
)
async def test_what_cannot_be_composed_is_refused_by_name(
    fleet: Any, body: dict[str, Any], status: int, param: str, part: str
) -> None:
    add = fleet.controller.table.adapters.add
    add(name="alias", digest="d-sql", version=1, parent="tiny")
    add(name="dora", digest="d-dora", version=1, parent="tiny", not_composable="DoRA")
    add(name="own", digest="d-own", version=1, parent="tiny", text_digest="tok-own")
    fleet.controller.publish()
    await fleet.until(lambda: "own" in fleet.state.table.models)
    for stream in (False, True):
        got, answer = await fleet.post("/v1/completions", BODY | body | {"stream": stream})
        assert (got, answer["error"]["param"]) == (status, param), answer
        assert part in answer["error"]["message"]
        if status == 422:
            assert answer["error"]["reason"] in ("not_composable", "different_texts")
    assert not fleet.worker.generates


async def test_weights_make_no_series_of_metrics_and_adapters_that_are_composed_are_in_use(fleet: Any) -> None:
    fleet.worker.permits = 0
    model = f"{SQL}:0.123+{PIRATE}:0.456"
    pending = asyncio.create_task(fleet.post("/v1/completions", BODY | {"model": model}))
    await fleet.until(lambda: fleet.worker.running)
    _, text = await fleet.get("/metrics")
    assert f'waiting_lora_adapters="{PIRATE},{SQL}"' in text
    fleet.worker.permits = None
    assert (await pending)[0] == 200
    _, text = await fleet.get("/metrics")
    assert "0.123" not in text
    assert 'model="tiny"' in text


async def test_a_composed_models_name_can_be_tokenized_for(fleet: Any) -> None:
    status, answer = await fleet.post("/tokenize", {"model": f"{SQL}:0.5+{PIRATE}", "prompt": "hello"})
    assert status == 200
    assert answer["tokens"] == (await fleet.post("/tokenize", {"prompt": "hello"}))[1]["tokens"]
    status, _ = await fleet.post("/tokenize", {"model": f"{SQL}:0.5+nobody", "prompt": "hello"})
    assert status == 404


async def test_openais_client_sends_compositions_either_way(fleet: Any) -> None:
    await fleet.openai.completions.create(model=f"{SQL}:0.7+{PIRATE}:0.3", prompt="hello", max_tokens=1)
    by_name = sent(fleet)
    await fleet.openai.completions.create(
        model="tiny",
        prompt="hello",
        max_tokens=1,
        extra_body={"adapters": [{"name": SQL, "weight": 0.7}, {"name": PIRATE, "weight": 0.3}]},
    )
    assert sent(fleet) == by_name == ("", [("d-pirate", 0.3), ("d-sql", 0.7)])
