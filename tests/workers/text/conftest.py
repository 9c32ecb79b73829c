"""Small tokenizers of the two families, made once: byte-level BPE, and SentencePiece-like with byte fallback."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from chat_families import CONTROL_TOKENS
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from tokenizers_on_disk import from_dir

from lorafleet.workers.text import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 4,
    "Numbers: 1 22 333 4444 and code: for i in range(10):\n    print(i)\n",
    "Grüße aus Köln, naïve café, 日本語のテキスト, 中文, русский, हिन्दी, 👍🏽 👩‍👩‍👧‍👦 🇫🇷 e\u0301",
]

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder: Path, backend: Backend, tokenizer_config: Mapping[str, Any], **others: Mapping[str, Any]) -> Path:
    """Write a tokenizer directory."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    for name, value in others.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def byte_level_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    backend.add_tokens(["<tool call>", AddedToken("日本!", normalized=False)])
    return backend


def metaspace_backend(*, fallback: bool = True) -> Backend:
    """Llama-2's arrangement: Metaspace, byte fallback, one leading space stripped, BOS by the post-processor."""
    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trained.train_from_iterator(
        CORPUS[:2], trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: number for number, token in enumerate(specials)}
    for token in model["vocab"]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials[:3]])
    backend.add_tokens(["[INST]"])
    return backend


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("models") / "byte-level",
        byte_level_backend(),
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "additional_special_tokens": ["<|im_start|>", "<|only in the config|>"],
            "chat_template": CHATML,
        },
        generation_config={"eos_token_id": [0, 2]},
        config={"model_type": "llama", "eos_token_id": 0},
    )


@pytest.fixture(scope="session")
def metaspace_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("models") / "metaspace",
        metaspace_backend(),
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "legacy": False,
            "add_bos_token": True,
        },
        config={"model_type": "llama", "eos_token_id": 2},
    )


@pytest.fixture(scope="session", params=[byte_level_backend, metaspace_backend], ids=["byte level", "metaspace"])
def family_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of each kind that knows the control tokens of all families of chat_families.py."""
    backend = request.param()
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in CONTROL_TOKENS])
    backend.add_tokens(["<think>", "</think>"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return write(tmp_path_factory.mktemp("models") / "families", backend, config)


@pytest.fixture(scope="session")
def byte_level(byte_level_dir: Path) -> Tokenizer:
    return from_dir(byte_level_dir)


@pytest.fixture(scope="session")
def metaspace(metaspace_dir: Path) -> Tokenizer:
    return from_dir(metaspace_dir)


@pytest.fixture(scope="session", params=["byte_level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    value = request.getfixturevalue(request.param)
    assert isinstance(value, Tokenizer)
    return value


@pytest.fixture(scope="session")
def metaspace_decoder() -> Tokenizer:
    """Its decoder is Metaspace alone, which drops the first token's spaces and knows no byte tokens."""
    backend = metaspace_backend()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    """Its decoder's tokens depend on their neighbours."""
    backend = Backend(
        models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "the": 3, "é": 4, "!": 5}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(backend)
