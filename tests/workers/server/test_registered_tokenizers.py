"""Tokenizers and templates of adapters as they were when each was registered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny

from lorafleet.workers.errors import ModelError
from lorafleet.workers.server.registered_tokenizers import RegisteredTokenizers, TokenizerFiles

TIMEOUT_S = 20.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    tiny.save_tokenizer(directory)
    return directory


def adapter(model: Path, name: str, template: str) -> Path:
    directory = model.parent / name
    directory.mkdir(exist_ok=True)
    (directory / "chat_template.jinja").write_text(template)
    return directory


def read(texts: RegisteredTokenizers, directory: Path) -> TokenizerFiles:
    text = texts.read(directory)
    assert text is not None
    return text


def files(texts: RegisteredTokenizers, digest: str) -> dict[str, bytes] | None:
    return texts.files(digest).result(TIMEOUT_S)


def test_what_was_registered_is_given_after_its_files_are_gone(model: Path) -> None:
    texts = RegisteredTokenizers(model)
    text = read(texts, adapter(model, "a", "A {{ messages }}"))
    texts.hold(text)
    shutil.rmtree(text.directory)
    given = files(texts, text.digest)
    assert given is not None and given["chat_template.jinja"] == b"A {{ messages }}"
    assert json.loads(given["tokenizer.json"]) == json.loads((model / "tokenizer.json").read_text())
    texts.close()


def test_it_is_kept_until_the_last_adapter_that_has_it_goes(model: Path) -> None:
    texts = RegisteredTokenizers(model)
    text = read(texts, adapter(model, "a", "A"))
    for _ in range(2):
        texts.hold(text)
    texts.release(text.digest)
    assert files(texts, text.digest) is not None
    texts.release(text.digest)
    texts.release("")
    assert files(texts, text.digest) is None
    texts.close()


def test_one_with_the_models_own_is_not_kept(model: Path) -> None:
    texts = RegisteredTokenizers(model)
    plain = model.parent / "plain"
    plain.mkdir()
    assert texts.read(plain) is None
    shutil.copy(model / "tokenizer.json", plain / "tokenizer.json")
    shutil.copy(model / "tokenizer_config.json", plain / "tokenizer_config.json")
    assert texts.read(plain) is None
    texts.close()


def test_what_is_the_models_is_in_memory_once(model: Path) -> None:
    texts = RegisteredTokenizers(model, max_bytes=10)
    for name in ("a", "b"):
        texts.hold(read(texts, adapter(model, name, name)))
    assert texts._bytes == 2, "their templates alone count"
    texts.close()


def test_beyond_the_bound_it_is_read_again_and_counts_if_it_is_the_same(model: Path) -> None:
    texts = RegisteredTokenizers(model, max_bytes=3)
    text = read(texts, adapter(model, "a", "long template"))
    texts.hold(text)
    given = files(texts, text.digest)
    assert given is not None and given["chat_template.jinja"] == b"long template"
    adapter(model, "a", "another one")
    assert files(texts, text.digest) is None
    shutil.rmtree(text.directory)
    assert files(texts, text.digest) is None
    texts.close()


def test_a_broken_tokenizer_is_refused(model: Path) -> None:
    texts = RegisteredTokenizers(model)
    broken = model.parent / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError):
        texts.read(broken)
    texts.close()
