"""A model's files as gateways and offline engines use them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafleet.workers.errors import ContextLengthError, ModelError
from lorafleet.workers.text.model_text import ModelText, sampling_defaults

TEMPLATE = (
    "{% for message in messages %}<{{ message['content'] }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture
def tokenizer_files(byte_level_dir: Path) -> dict[str, bytes]:
    return {
        "tokenizer.json": (byte_level_dir / "tokenizer.json").read_bytes(),
        "chat_template.jinja": TEMPLATE.encode(),
    }


@pytest.mark.parametrize(
    ("config", "defaults"),
    [
        (None, {}),
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}, None),
        ({"temperature": None, "max_length": 20, "do_sample": False}, {}),
        ({"temperature": -1, "top_k": 5}, {"top_k": 5}),
    ],
)
def test_generation_config_gives_the_defaults_that_requests_could_ask_for(
    config: dict[str, float] | None, defaults: dict[str, float] | None
) -> None:
    files = {} if config is None else {"generation_config.json": json.dumps(config).encode()}
    assert sampling_defaults(files) == (config if defaults is None else defaults)


def test_broken_files_are_named(tokenizer_files: dict[str, bytes]) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        ModelText.from_files("d", {})
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        ModelText.from_files("d", tokenizer_files | {"generation_config.json": b"{"})


def test_a_chat_is_the_templates_text_tokenized(tokenizer_files: dict[str, bytes]) -> None:
    text = ModelText.from_files("d", tokenizer_files)
    ids = text.encode_chat([{"role": "user", "content": "hello"}], add_generation_prompt=True, add_special_tokens=False)
    decoded = text.tokenizer.decode(ids, skip_special_tokens=False)
    assert decoded == "<hello>:"


def test_a_chat_that_cannot_fit_is_over_the_context_and_names_the_messages(tokenizer_files: dict[str, bytes]) -> None:
    text = ModelText.from_files("d", tokenizer_files)
    with pytest.raises(ContextLengthError, match="64 tokens, the limit") as caught:
        text.encode_chat(
            [{"role": "user", "content": "hello" * 10_000}],
            add_generation_prompt=True,
            add_special_tokens=False,
            max_tokens=64,
        )
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "takes_system"),
    [
        ("{{ messages[0].content }}", True),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}", False),
    ],
)
def test_whether_a_template_takes_a_system_message_is_tried(
    tokenizer_files: dict[str, bytes], template: str, takes_system: bool
) -> None:
    files = tokenizer_files | {"chat_template.jinja": template.encode()}
    assert ModelText.from_files("digest", files).tool_form.takes_system is takes_system
