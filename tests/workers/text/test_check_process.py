"""Tokenizers and templates are tried in a process of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.workers.errors import ModelError
from lorafleet.workers.text import check_process
from lorafleet.workers.text.check_process import check_apart, problem
from lorafleet.workers.text.files import read_text_files


@pytest.fixture
def files(byte_level_dir: Path) -> dict[str, bytes]:
    return read_text_files(byte_level_dir)


def test_a_good_tokenizer_passes(files: dict[str, bytes]) -> None:
    check_apart("digest", files)


def test_what_is_wrong_is_said_as_in_this_process(files: dict[str, bytes]) -> None:
    files["chat_template.jinja"] = b"{% if %}"
    message = problem("digest", files)
    assert message is not None and "does not compile" in message
    with pytest.raises(ModelError) as caught:
        check_apart("digest", files)
    assert caught.value.message == message


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% set x = 'x' * 9000000 %}{{ [x, x] | join }}",
    ],
)
def test_a_template_that_passes_its_bounds_is_refused_and_one_that_wants_other_messages_is_not(
    template: str, files: dict[str, bytes]
) -> None:
    message = problem("digest", files | {"chat_template.jinja": template.encode()})
    assert message is not None and message.startswith("chat_template: ")
    assert problem("digest", files | {"chat_template.jinja": b"{{ raise_exception('system first') }}"}) is None


def test_a_library_that_breaks_or_takes_too_long_ends_its_process_only(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in (
        "import os; os.abort()",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile 1: 0",
    ):
        monkeypatch.setattr(check_process, "_CODE", code)
        with pytest.raises(ModelError, match="breaks the library"):
            check_apart("digest", files)


def test_a_tokenizer_with_a_pattern_that_takes_for_ever_is_refused(files: dict[str, bytes]) -> None:
    tokenizer = json.loads(files["tokenizer.json"])
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    hostile = files | {"tokenizer.json": json.dumps(tokenizer | {"pre_tokenizer": pattern}).encode()}
    with pytest.raises(ModelError, match=r"tokenizer\.json: The model's tokenizer cannot take this text"):
        check_apart("digest", hostile)


def test_any_rubbish_is_a_model_error(files: dict[str, bytes]) -> None:
    tokenizer = json.loads(files["tokenizer.json"])
    changes: list[dict[str, Any]] = [{"model": {}}, {"decoder": {"type": "X"}}, {"added_tokens": [{"id": -1}]}]
    for change in [*changes, {"version": 3}]:
        message = problem("digest", files | {"tokenizer.json": json.dumps(tokenizer | change).encode()})
        assert message is not None and len(message) < 600


@pytest.mark.parametrize(
    ("default", "message"),
    [
        ({"regex": "[a-c]+"}, None),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a", "json": {}}, "has json and regex"),
        ({"rejex": "a"}, r"\['rejex'\]; it may have json, regex"),
    ],
)
def test_a_default_for_structured_output_must_be_one_that_can_be_enforced(
    files: dict[str, bytes], default: dict[str, Any], message: str | None
) -> None:
    profile = files | {"lorafleet.json": json.dumps({"structured_outputs": default}).encode()}
    if message is None:
        check_apart("digest", profile)
        return
    with pytest.raises(ModelError, match=f"lorafleet.json: .*{message}"):
        check_apart("digest", profile)
