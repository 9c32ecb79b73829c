"""An adapter's tokenizer and template are its own, the model's, or refused; nothing is trusted before it was tried."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafleet.workers.errors import ModelError
from lorafleet.workers.text import adapter_tokenizers
from lorafleet.workers.text.adapter_tokenizers import AdapterTokenizers

Write = Callable[[Path], object]


def text(name: str, content: str) -> Write:
    return lambda folder: (folder / name).write_text(content)


def changed(name: str, **fields: object) -> Write:
    def write(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))

    return write


@pytest.fixture
def own(byte_level_dir: Path, tmp_path: Path) -> Path:
    """An adapter with the model's tokenizer and its own template."""
    folder = tmp_path / "own"
    shutil.copytree(byte_level_dir, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


HOSTILE: dict[str, tuple[Write, str]] = {
    "deep config": (text("tokenizer_config.json", '{"a":' * 100_000), "nested too deeply"),
    "deep tokenizer": (text("tokenizer.json", "[" * 100_000), "tokenizer.json"),
    "an unknown parser": (
        text("lorafleet.json", '{"tool_call_parser": "x"}'),
        "tool_call_parser of lorafleet.json is 'x'",
    ),
    "a template of 1 MB": (text("chat_template.jinja", "x" * 1_000_000), "is larger than 524,288 bytes"),
    "a template of 400 kB": (
        text("chat_template.jinja", "{{ x }}" * 57_000),
        "399,000 characters; the limit is 131,072",
    ),
    "a template of 1 MB in the config": (
        changed("tokenizer_config.json", chat_template=[{"name": "default", "template": "x" * 1_000_000}]),
        "the limit is 131,072",
    ),
    "an endless template": (
        text("chat_template.jinja", "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"),
        "more than 1,000,000 steps",
    ),
    "a template that makes 1 GB": (
        text("chat_template.jinja", "{% set x = 'x' * 9000000 %}{{ (x ~ x) ~ (x ~ x) }}"),
        "longer than 16,000,000",
    ),
    "a token of another type": (changed("tokenizer_config.json", eos_token=[1] * 100_000), "is not a token"),
    "a decoder of other types": (changed("tokenizer_config.json", added_tokens_decoder={"1": 3}), "is not a token"),
    "an id of 5,000 digits": (
        changed("tokenizer_config.json", added_tokens_decoder={"9" * 5000: {"content": "a"}}),
        "added_tokens_decoder",
    ),
    "a pointer": (text("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
    "no tokenizer": (changed("tokenizer.json", model={"type": "BPE", "vocab": {"a": -1}, "merges": []}), "tokenizer"),
    "an unknown part": (changed("tokenizer.json", decoder={"type": "Sequence", "decoders": [{}]}), "tokenizer"),
}


@pytest.mark.parametrize(("write", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_tokenizer_or_template_is_refused_by_name(
    write: Write, message: str, byte_level_dir: Path, own: Path
) -> None:
    (own / "chat_template.jinja").unlink()
    write(own)
    with pytest.raises(ModelError) as caught:
        AdapterTokenizers(byte_level_dir).files(own)
    assert message in caught.value.message
    assert len(caught.value.message) < 1000 and str(own) not in caught.value.message


def test_files_are_tried_once_and_those_that_are_the_models_not_at_all(
    byte_level_dir: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(adapter_tokenizers, "check_apart", lambda digest, files: tried.append(digest))
    texts = AdapterTokenizers(byte_level_dir)
    assert texts.files(byte_level_dir) is None
    assert texts.files(own) == texts.files(own)
    (own / "chat_template.jinja").write_text("another")
    files = texts.files(own)
    assert files is not None and files["tokenizer.json"] is texts.model_files["tokenizer.json"], "in memory once"
    assert len(tried) == len(set(tried)) == 2


def test_what_was_refused_is_tried_again(byte_level_dir: Path, own: Path) -> None:
    texts = AdapterTokenizers(byte_level_dir)
    (own / "chat_template.jinja").write_text("{% if %}")
    for _ in range(2):
        with pytest.raises(ModelError, match="does not compile"):
            texts.files(own)
    (own / "chat_template.jinja").write_text("good")
    assert texts.files(own) is not None


def test_links_out_of_the_roots_are_refused(byte_level_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("secret")
    (root / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"chat_template\.jinja is a link to outside"):
        AdapterTokenizers(byte_level_dir).files(root, [root])
    assert AdapterTokenizers(byte_level_dir).files(root) is not None
