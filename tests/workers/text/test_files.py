"""An adapter's tokenizer and template merged over its model's."""

from __future__ import annotations

import json

import pytest

from lorafleet.workers.errors import ModelError
from lorafleet.workers.text.files import chunks, files_digest, over_model

CONFIG = {"eos_token": "</s>"}


def config(**fields: str) -> bytes:
    return json.dumps(CONFIG | fields).encode()


MODEL = {
    "tokenizer.json": b"model tokenizer",
    "tokenizer_config.json": config(chat_template="model template"),
    "generation_config.json": b"{}",
}
JINJA_MODEL = MODEL | {"tokenizer_config.json": config(), "chat_template.jinja": b"model template"}


def test_an_adapter_without_files_of_its_own_has_the_models() -> None:
    assert over_model(MODEL, {}) == MODEL
    assert over_model(MODEL, {"config.json": b"{}", "generation_config.json": b"other"}) == MODEL


def test_a_tokenizer_saved_unchanged_beside_an_adapter_is_the_models() -> None:
    assert over_model(MODEL, dict(MODEL)) == MODEL


def test_a_tokenizer_of_its_own_replaces_all_but_the_generation_config() -> None:
    own = {"tokenizer.json": b"own", "tokenizer_config.json": config(chat_template="own template")}
    assert over_model(MODEL, own) == own | {"generation_config.json": b"{}"}


def test_a_tokenizer_without_a_template_gets_the_models() -> None:
    own = {"tokenizer.json": b"own", "tokenizer_config.json": json.dumps({"eos_token": "<end>"}).encode()}
    merged = over_model(MODEL, own)
    assert json.loads(merged["tokenizer_config.json"]) == {"eos_token": "<end>", "chat_template": "model template"}
    assert over_model(JINJA_MODEL, own)["chat_template.jinja"] == b"model template"


@pytest.mark.parametrize("model", [MODEL, JINJA_MODEL])
@pytest.mark.parametrize(
    "own",
    [{"chat_template.jinja": b"own"}, {"tokenizer_config.json": config(chat_template="own", eos_token="<other>")}],
)
def test_a_template_alone_goes_over_the_models_tokenizer(model: dict[str, bytes], own: dict[str, bytes]) -> None:
    merged = over_model(model, own)
    merged_config = json.loads(merged["tokenizer_config.json"])
    assert merged["tokenizer.json"] == b"model tokenizer"
    assert merged_config["eos_token"] == "</s>"
    assert (merged.get("chat_template.jinja", b"").decode() or merged_config["chat_template"]) == "own"


@pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff"])
def test_a_broken_config_is_named(data: bytes) -> None:
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        over_model(MODEL, {"tokenizer_config.json": data})


def test_chunks_are_small_and_name_every_file() -> None:
    files = {"a": b"x" * (5 << 19), "b": b""}
    got: dict[str, bytes] = {}
    for name, data in chunks(files):
        assert len(data) <= 1 << 20
        got[name] = got.get(name, b"") + data
    assert got == files
    assert files_digest(got) == files_digest(files)


def test_a_profile_goes_over_the_models_and_changes_nothing_else() -> None:
    model = MODEL | {"lorafleet.json": b"{}"}
    assert over_model(model, {"lorafleet.json": b'{"a": 1}'}) == model | {"lorafleet.json": b'{"a": 1}'}
    assert over_model(model, {"tokenizer.json": b"own"})["lorafleet.json"] == b"{}"
    assert over_model(MODEL, {"lorafleet.json": b"{}"}) == model
