"""The reference is transformers' AutoTokenizer on the same directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers
from tokenizers_on_disk import from_dir

from lorafleet.workers.errors import ContextLengthError, InvalidRequestError, ModelError
from lorafleet.workers.text import TOKENIZER_FILES, ChatTemplate, Tokenizer

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two leading spaces and a tail  ",
    "2024 has 4 digits\n\n\tand tabs",
    "日本語 👩‍👩‍👧‍👦 e\u0301 naïve 🇫🇷",
    "日本! and <tool call> and <|only in the config|>x",
    "<|im_start|>user\nhi<|im_end|>\n<s>[INST] hi [/INST]</s>",
    "\x00\x07\ufffd",
]


def reference(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module", params=["byte_level_dir", "metaspace_dir"])
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, Any]:
    path = request.getfixturevalue(request.param)
    return from_dir(path), reference(path)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encoding_equals_transformers(pair: tuple[Tokenizer, Any], add_special_tokens: bool) -> None:
    ours, theirs = pair
    expected = [theirs.encode(text, add_special_tokens=add_special_tokens) for text in TEXTS]
    assert [ours.encode(text, add_special_tokens) for text in TEXTS] == expected
    assert ours.encode_batch(TEXTS, add_special_tokens) == expected


@pytest.mark.parametrize("skip", [True, False])
def test_decoding_equals_transformers(pair: tuple[Tokenizer, Any], skip: bool) -> None:
    ours, theirs = pair
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_encoding_equals_transformers_for_any_text(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text)


def test_sizes_and_special_tokens_equal_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.bos_token_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_token_ids
    assert set(theirs.all_special_ids) == ours.special_token_ids
    assert all(ours.id_to_token(i) == theirs.convert_ids_to_tokens(i) for i in range(len(theirs)))


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize("flag", [True, False])
def test_add_bos_token_counts_for_nothing_beside_a_tokenizer_json(
    metaspace_dir: Path, tmp_path: Path, kind: str, flag: bool
) -> None:
    tokenizer_json = json.loads((metaspace_dir / "tokenizer.json").read_text())
    for processor in (tokenizer_json["post_processor"], None):
        tokenizer_json["post_processor"] = processor
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
        config: dict[str, Any] = {
            "tokenizer_class": kind,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        config |= {"add_bos_token": flag, "add_eos_token": flag, "legacy": False}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert from_dir(tmp_path).encode("the fox") == reference(tmp_path).encode("the fox")


def test_the_file_is_followed_where_transformers_5_rebuilds_a_class_by_its_standard(
    metaspace_dir: Path, tmp_path: Path
) -> None:
    """Llama-2's tokenizer.json: a Prepend normalizer, which acts on each stretch between special tokens."""
    backend = Backend.from_file(str(metaspace_dir / "tokenizer.json"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer_json = json.loads(backend.to_str()) | {"pre_tokenizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    text = "<s>fox"
    for kind in ("PreTrainedTokenizerFast", "LlamaTokenizer"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": kind}))
        ours, theirs = from_dir(tmp_path), reference(tmp_path)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == "<s><s> fox"
        assert (ours.encode(text) == theirs.encode(text)) == (kind == "PreTrainedTokenizerFast")


def test_tokens_that_only_the_config_declares_are_added_as_transformers_adds_them(
    byte_level_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level_dir / "tokenizer.json").read_bytes())
    size = from_dir(tmp_path).vocab_size
    flags = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": {"__type": "AddedToken", "content": "<pad>", **flags},
        "image_token": "<image>",
        "extra_special_tokens": ["<more>"],
        "added_tokens_decoder": {str(size): {"content": "<strip>", **flags}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = from_dir(tmp_path), reference(tmp_path)
    text = "a  <strip> b <pad><image><more>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_special_tokens_map_is_read_when_the_config_has_no_added_tokens(byte_level_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level_dir / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    tokenizer = from_dir(tmp_path)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.bos_token_id is None


def test_eos_ids_are_the_union_of_all_files(byte_level: Tokenizer, metaspace: Tokenizer) -> None:
    assert byte_level.eos_token_ids == {0, 2}
    assert metaspace.eos_token_ids == {2}


def test_truncation_and_padding_of_the_file_are_off(byte_level_dir: Path, tmp_path: Path) -> None:
    backend = Backend.from_file(str(byte_level_dir / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = from_dir(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a b c d e f")) == "a b c d e f"
    assert [len(ids) for ids in tokenizer.encode_batch(["a", "a!?"])] == [1, 3]


def test_from_files_equals_from_dir(byte_level_dir: Path, byte_level: Tokenizer) -> None:
    files = {name: (byte_level_dir / name).read_bytes() for name in TOKENIZER_FILES if (byte_level_dir / name).exists()}
    other = Tokenizer.from_files(files)
    assert other.encode("Hello 123") == byte_level.encode("Hello 123")
    assert other.eos_token_ids == byte_level.eos_token_ids
    assert other.chat_templates == byte_level.chat_templates


def test_one_that_differs_in_its_template_alone_is_not_read_again(byte_level_dir: Path, byte_level: Tokenizer) -> None:
    files = {name: (byte_level_dir / name).read_bytes() for name in TOKENIZER_FILES if (byte_level_dir / name).exists()}
    known = Tokenizer.from_files(files)
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": "own"}
    own = Tokenizer.from_files(files | {"tokenizer_config.json": json.dumps(config, indent=1).encode()}, [known])
    assert own._backend is known._backend
    assert own.encode("hello wörld") == known.encode("hello wörld")
    template = Tokenizer.from_files(files | {"chat_template.jinja": b"own"}, [known])
    assert template._backend is known._backend
    assert template.chat_templates == {"default": "own"} != known.chat_templates
    other_eos = Tokenizer.from_files(files | {"generation_config.json": b'{"eos_token_id": 3}'}, [known])
    assert 3 in other_eos.eos_token_ids and known.eos_token_ids == byte_level.eos_token_ids


def test_one_that_declares_another_token_is_read(byte_level_dir: Path) -> None:
    files = {name: (byte_level_dir / name).read_bytes() for name in TOKENIZER_FILES if (byte_level_dir / name).exists()}
    known = Tokenizer.from_files(files)
    config = json.loads(files["tokenizer_config.json"]) | {"additional_special_tokens": ["<|new|>"]}
    own = Tokenizer.from_files(files | {"tokenizer_config.json": json.dumps(config).encode()}, [known])
    assert own.token_to_id("<|new|>") is not None and known.token_to_id("<|new|>") is None


def test_token_bytes_join_to_the_text(byte_level: Tokenizer) -> None:
    text = "Grüße 日本語 👩‍👩‍👧‍👦 <tool call><|im_end|>"
    ids = byte_level.encode(text)
    assert b"".join(byte_level.token_bytes(i) or b"" for i in ids).decode() == text


def test_token_bytes_of_byte_fallback_tokens_join_to_the_text_with_its_leading_space(metaspace: Tokenizer) -> None:
    text = "the 日本語 👍🏽"
    ids = metaspace.encode(text, add_special_tokens=False)
    assert b"".join(metaspace.token_bytes(i) or b"" for i in ids).decode() == " " + text
    assert metaspace.token_bytes(metaspace.token_to_id("<0xE2>") or 0) == b"\xe2"


def test_a_token_decoded_alone_keeps_its_space_and_marks_partial_characters(metaspace: Tokenizer) -> None:
    assert metaspace.decode_token(metaspace.encode("the", add_special_tokens=False)[0]).startswith(" ")
    assert metaspace.decode_token(metaspace.token_to_id("<0xE2>") or 0) == "\ufffd"
    assert metaspace.decode_token(1) == "<s>"


def test_an_unknown_id_has_no_bytes_and_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(10**6) is None
    assert tokenizer.decode_token(10**6) == ""
    assert tokenizer.id_to_token(10**6) is None


def test_tokens_of_other_decoders_are_decoded_by_the_library(wordpiece: Tokenizer) -> None:
    assert wordpiece.decode_token(4) == "é"
    assert wordpiece.token_bytes(4) == "é".encode()


def test_an_unpaired_surrogate_is_the_callers_mistake(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"U\+D83D\) at character 2"):
        tokenizer.encode("hi\ud83d")
    with pytest.raises(InvalidRequestError, match="at character 0"):
        tokenizer.encode_batch(["fine", "\udc00"])


def test_an_id_that_the_model_has_no_row_for_is_named_with_its_token(tokenizer: Tokenizer) -> None:
    last = tokenizer.vocab_size - 1
    tokenizer.check_ids([0, last], last + 1, "prompt")
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer.check_ids([0, last], last, "prompt")
    token = tokenizer.id_to_token(last)
    assert caught.value.message == (
        f"prompt has the token id {last} (the tokenizer's {token!r}, for which the model has no row); ids go from 0 to "
        f"{last - 1}."
    )
    for bad in (-1, 10**400, tokenizer.vocab_size + 5):
        with pytest.raises(InvalidRequestError, match="prompt has the token id"):
            tokenizer.check_ids([bad], last, "prompt")


def test_a_text_that_is_no_string_is_a_type_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError):
        tokenizer.encode(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        tokenizer.encode_batch([3])  # type: ignore[list-item]


def test_a_directory_without_tokenizer_json_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json\. .*save_pretrained"):
        from_dir(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is not a tokenizer: .*EOF"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json cannot be read as JSON"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is not JSON in UTF-8"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds list, not a JSON object"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token of tokenizer_config.json is not a token: 3"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": {}}}', "is not a token"),
        ("tokenizer_config.json", b'{"extra_special_tokens": 3}', "must be a list, not 3"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template of tokenizer_config.json"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}', "chat_template of tokenizer_config.json"),
        ("special_tokens_map.json", b"nul", "special_tokens_map.json cannot be read as JSON"),
        ("tokenizer_config.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"' + b"9" * 5000 + b'": {}}}', "added_tokens_decoder"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid", "tokenizer.json is a Git LFS pointer"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id of generation_config.json"),
        ("config.json", b'{"eos_token_id": [1, -1]}', "eos_token_id of config.json"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
    ],
)
def test_a_bad_file_is_refused_by_name(byte_level_dir: Path, name: str, content: bytes, reason: str) -> None:
    files = {"tokenizer.json": (byte_level_dir / "tokenizer.json").read_bytes()}
    with pytest.raises(ModelError, match=reason):
        Tokenizer.from_files(files | {name: content})


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")

    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read: Permission denied"):
        from_dir(tmp_path)


def test_the_package_pulls_in_neither_torch_nor_transformers_nor_ray(byte_level_dir: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lorafleet.workers.text import ChatTemplate, OutputText, Tokenizer\n"
        "from lorafleet.workers.text.files import read_text_files\n"
        "tokenizer = Tokenizer.from_files(read_text_files(Path(sys.argv[1])))\n"
        "text = ChatTemplate.from_tokenizer(tokenizer).render([{'role': 'user', 'content': 'hi'}])\n"
        "output = OutputText(tokenizer, tokenizer.encode(text), stop=['x'])\n"
        "assert output.push(tokenizer.encode('a reply'), finished=True).text == 'a reply'\n"
        "print({'torch', 'transformers', 'ray', 'numpy', 'grpc', 'aiohttp'} & set(sys.modules))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(byte_level_dir)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "set()"), result.stderr


def test_the_demo_model_equals_transformers(demo_model: Path) -> None:
    ours, theirs = from_dir(demo_model), reference(demo_model)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    rendered = ChatTemplate.from_tokenizer(ours).render(messages, **ours.special_tokens)
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class Watched:
    """A backend that records the number of characters in each call."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.calls: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.calls.append(("encode", len(text)))
        return self._backend.encode(text, **options)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.calls.append(("encode_batch_fast", sum(map(len, texts))))
        return self._backend.encode_batch_fast(texts, **options)


@pytest.fixture
def watched(byte_level_dir: Path) -> tuple[Watched, Tokenizer]:
    backend = Watched(Backend.from_file(str(byte_level_dir / "tokenizer.json")))
    return backend, Tokenizer(backend)  # type: ignore[arg-type]


def test_a_long_text_goes_through_the_call_that_releases_the_gil(watched: tuple[Watched, Tokenizer]) -> None:
    backend, tokenizer = watched
    text = "hello world " * 1000
    assert tokenizer.encode(text) == backend._backend.encode(text).ids
    assert backend.calls == [("encode_batch_fast", len(text))]


def test_a_text_that_cannot_fit_is_refused_by_its_characters_alone(watched: tuple[Watched, Tokenizer]) -> None:
    backend, tokenizer = watched
    longest = max(map(len, backend.get_vocab()))
    text = "a" * (64 * longest + 1)
    with pytest.raises(ContextLengthError, match=rf"length is 64 tokens\..* {len(text)} characters") as caught:
        tokenizer.encode(text, max_tokens=64)
    assert caught.value.param == "prompt"
    assert backend.calls == []
    assert tokenizer.encode("<|endoftext|>" * 64, max_tokens=64) == tokenizer.encode("<|endoftext|>" * 64)


def test_of_a_text_that_might_fit_by_its_characters_no_more_is_encoded_than_shows_that_it_does_not(
    watched: tuple[Watched, Tokenizer],
) -> None:
    backend, tokenizer = watched
    max_tokens = 100_000
    text = "z" * (max_tokens * 12)  # a token each
    with pytest.raises(ContextLengthError, match="maximum context length is 100000 tokens"):
        tokenizer.encode(text, max_tokens=max_tokens)
    assert sum(num_chars for _, num_chars in backend.calls) < 2 * max_tokens


@pytest.mark.parametrize("max_tokens", [25_000, 33_000])
def test_a_text_near_the_limit_is_encoded_whole(watched: tuple[Watched, Tokenizer], max_tokens: int) -> None:
    _, tokenizer = watched
    text = "<|endoftext|>" * 20_000 + "日本! " * 3000  # 13 and 2 characters a token, some across a cut
    ids = tokenizer.encode(text)
    assert abs(len(ids) - max_tokens) < max_tokens * 0.5
    assert tokenizer.encode(text, max_tokens=max_tokens) == ids
