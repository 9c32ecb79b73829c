"""Registering any directory ends: with an adapter, or with a refusal that has a reason.

No registration hangs, no message is long, and none contains a path that the caller did not send.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lorafleet.workers.adapters.config import CONFIG_FILE
from lorafleet.workers.adapters.format import AdapterSpec, read_adapter_spec
from lorafleet.workers.adapters.modules import BaseShapes
from lorafleet.workers.adapters.vocabulary import NEW_EMBEDDINGS_FILE
from lorafleet.workers.adapters.weights_file import WEIGHTS_FILE
from lorafleet.workers.errors import AdapterRefusedError, ModelError
from lorafleet.workers.sources.adapters import resolve_adapter
from lorafleet.workers.text.files import read_adapter_files

BASE = BaseShapes(num_layers=2, linears={"q_proj": (8, 8), "v_proj": (8, 4)}, hidden_size=8, vocab_size=16)
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
Q = "base_model.model.model.layers.0.self_attn.q_proj."
A, B = f"{Q}lora_A.weight", f"{Q}lora_B.weight"
LONGEST_MESSAGE = 1500
TIMEOUT_S = 60.0


def weights() -> bytes:
    return save({A: torch.ones(2, 8), B: torch.ones(8, 2)})


def write(path: Path, config: object = CONFIG, data: bytes | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / CONFIG_FILE).write_text(config if isinstance(config, str) else json.dumps(config))
    (path / WEIGHTS_FILE).write_bytes(weights() if data is None else data)
    return path


def attempt(path: Path, root: Path) -> AdapterSpec | AdapterRefusedError:
    """Register a directory that the caller names relative to a root; return the outcome."""
    outcome: list[AdapterSpec | BaseException] = []

    def register() -> None:
        try:
            folder = resolve_adapter(str(path.relative_to(root)), [str(root)])
            outcome.append(read_adapter_spec(folder, BASE, max_lora_rank=16, max_extra_vocab=8))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=register, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    assert outcome, "it hangs"
    assert isinstance(outcome[0], AdapterSpec | AdapterRefusedError), repr(outcome[0])
    return outcome[0]


def assert_refused(path: Path, root: Path, *reasons: str) -> None:
    error = attempt(path, root)
    assert isinstance(error, AdapterRefusedError), "it is served"
    assert error.reason in reasons if reasons else error.reason
    assert len(error.message) <= LONGEST_MESSAGE, len(error.message)
    assert str(root) not in error.message, error.message


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 32)


def link_out(path: Path) -> None:
    outside = path.parents[2] / "outside"
    outside.mkdir(exist_ok=True)
    (outside / path.name).write_bytes(weights() if path.name == WEIGHTS_FILE else json.dumps(CONFIG).encode())
    path.symlink_to(outside / path.name)


OTHER_THINGS: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "directory": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "broken link": lambda path: path.symlink_to("nowhere"),
    "link out of the root": link_out,
    "4 GiB of zeros": sparse,
    "empty": Path.touch,
}
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json")


@pytest.mark.parametrize("thing", OTHER_THINGS)
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, NEW_EMBEDDINGS_FILE])
def test_something_else_in_a_files_place_is_refused(name: str, thing: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    path = write(root / "a")
    (path / name).unlink(missing_ok=True)
    OTHER_THINGS[thing](path / name)
    reasons = {"link out of the root": ("outside_roots",), "broken link": ("broken_link",)}
    assert_refused(path, root, *reasons.get(thing, ()))


@pytest.mark.parametrize("thing", [thing for thing in OTHER_THINGS if thing != "empty"])
@pytest.mark.parametrize("name", TEXT_FILES)
def test_something_else_in_the_place_of_a_tokenizers_file_is_refused(name: str, thing: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    path = write(root / "a")
    OTHER_THINGS[thing](path / name)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")) as caught:
        read_adapter_files(path, [root])
    assert str(root) not in caught.value.message and len(caught.value.message) < LONGEST_MESSAGE


def test_the_same_files_without_links_are_served(tmp_path: Path) -> None:
    assert isinstance(attempt(write(tmp_path / "a"), tmp_path), AdapterSpec)


CONFIGS: dict[str, object] = {
    "duplicate keys": '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "r": -1}',
    "not a number": '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}',
    "minus infinity": '{"peft_type": "LORA", "r": 2, "lora_alpha": -Infinity}',
    "a rank of 4,000 digits": f'{{"peft_type": "LORA", "r": {"9" * 4000}, "lora_alpha": 4}}',
    "a rank of 5,000 digits": f'{{"peft_type": "LORA", "r": {"9" * 5000}, "lora_alpha": 4}}',
    "a rank of 2^62": CONFIG | {"r": 1 << 62},
    "a deep value": '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "x": ' + "[" * 900 + "]" * 900 + "}",
    "100,000 deep": '{"a":' * 100_000,
    "1 MB of a type": CONFIG | {"peft_type": "x" * 1_000_000},
    "1 MB of an initialisation": CONFIG | {"init_lora_weights": "pissa" + "x" * 1_000_000},
    "5 MB": CONFIG | {"x": "y" * 5_000_000},
    "a long name": CONFIG | {"x" * 900_000: 1},
    "a long pattern": CONFIG | {"rank_pattern": {"x" * 900_000: 2}},
    "many patterns": CONFIG | {"rank_pattern": {f"x{i}": 2 for i in range(30_000)}},
    "a pattern that takes for ever": CONFIG | {"alpha_pattern": {r"(([a-z_.0-9])+)+!": 3}},
    "many modules": CONFIG | {"modules_to_save": [f"x{i}" for i in range(50_000)]},
    "a long module": CONFIG | {"modules_to_save": ["x" * 900_000]},
    "many token ids": CONFIG | {"trainable_token_indices": list(range(150_000))},
    "a large token id": CONFIG | {"trainable_token_indices": [1 << 62]},
    "a token id of 4,000 digits": '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alora_invocation_tokens": ['
    + "9" * 4000
    + "]}",
    "a base model of 1 MB": CONFIG | {"base_model_name_or_path": "x" * 1_000_000, "r": 3},
    "a switch of another type": CONFIG | {"use_rslora": "false"},
    "a NUL": "\0",
    "nothing": "",
    "a web page": "<!DOCTYPE html><html></html>",
    "a pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n",
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_hostile_config_is_refused(config: object, tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "a", config), tmp_path)


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(shape: list[Any], start: int, stop: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = {A: entry([2, 8], 0, 64), B: entry([8, 2], 64, 128)}
DATA = bytes(128)


def layer(number: str) -> str:
    return A.replace("layers.0", f"layers.{number}")


FILES: dict[str, bytes] = {
    "a header of 4 GiB": file_of(b"{}", length=1 << 32),
    "a header of 2^63 bytes": file_of(b"{}", length=1 << 63),
    "a header over the file's end": file_of(GOOD, DATA, length=1 << 20),
    "a header cut short": file_of(GOOD, DATA, length=20),
    "a header of blanks": file_of(b" " * 100),
    "a header of 5 MB": file_of(GOOD | {"__metadata__": {"x": "y" * 5_000_000}}, DATA),
    "a deep header": file_of(b"[" * 100_000),
    "a header that is no object": file_of([1]),
    "a header that is not UTF-8": file_of(b'{"\xff": 1}'),
    "overlapping tensors": file_of({A: entry([2, 8], 0, 64), B: entry([8, 2], 32, 96)}, DATA),
    "a gap": file_of({A: entry([2, 8], 0, 64), B: entry([8, 2], 68, 132)}, bytes(132)),
    "negative offsets": file_of({A: entry([2, 8], -64, 0), B: entry([8, 2], 0, 64)}, DATA),
    "offsets backwards": file_of({A: entry([2, 8], 64, 0), B: entry([8, 2], 64, 128)}, DATA),
    "offsets of 2^64": file_of({A: entry([2, 8], 0, 1 << 64)}, DATA),
    "offsets beyond the end": file_of({A: entry([2, 8], 0, 64), B: entry([1 << 40, 2], 64, 64 + (1 << 43))}, DATA),
    "a shape that overflows": file_of({A: entry([1 << 32, 1 << 32, 1 << 32], 0, 64)}, DATA),
    "a negative shape": file_of({A: entry([-2, 8], 0, 64)}, DATA),
    "a shape of text": file_of({A: entry(["2", 8], 0, 64)}, DATA),
    "1,000 dimensions": file_of({A: entry([1] * 1000, 0, 4)}, bytes(4)),
    "no dimensions": file_of({A: entry([], 0, 4)}, bytes(4)),
    "another dtype": file_of({A: entry([2, 8], 0, 64, "F31")}, DATA),
    "a dtype of another type": file_of({A: entry([2, 8], 0, 64, 3)}, DATA),
    "complex numbers": file_of({A: entry([2, 8], 0, 128, "C64")}, DATA),
    "a layer of 5,000 digits": file_of({layer("9" * 5000): entry([2, 8], 0, 64)}, DATA[:64]),
    "a layer 007": file_of({layer("00"): entry([2, 8], 0, 64)}, DATA[:64]),
    "a layer of other digits": file_of({layer("٣"): entry([2, 8], 0, 64)}, DATA[:64]),
    "a layer of the millions": file_of({layer("999999"): entry([2, 8], 0, 64)}, DATA[:64]),
    "a name of 3 MB": file_of({"x" * 3_000_000: entry([2, 8], 0, 64)}, DATA[:64]),
    "a name with line breaks": file_of({"a\n\0\x1b[2J": entry([2, 8], 0, 64)}, DATA[:64]),
    "many tensors": file_of({f"x{i}": entry([], 4 * i, 4 * i + 4) for i in range(40_000)}, bytes(160_000)),
    "no tensors": file_of({}),
    "all empty": file_of({A: entry([0], 0, 0), B: entry([0], 0, 0)}),
    "one empty": file_of({A: entry([0, 8], 0, 0), B: entry([8, 2], 0, 64)}, DATA[:64]),
    "NaN": file_of(GOOD, b"\xff" * 128),
    "a pickle": b"\x80\x04." + bytes(100),
    "a zip": b"PK\x03\x04" + bytes(100),
    "GGUF": b"GGUF\x03\0\0\0" + bytes(100),
    "three bytes": b"abc",
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES.keys())
def test_a_hostile_weights_file_is_refused(data: bytes, tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "a", data=data), tmp_path)


def test_metadata_of_other_types_does_not_matter_or_is_refused(tmp_path: Path) -> None:
    odd: tuple[object, ...] = {"x": 3}, [], None, {"x": {"y": 1}}, "text"
    for number, metadata in enumerate(odd):
        outcome = attempt(
            write(tmp_path / f"{number}", data=file_of(GOOD | {"__metadata__": metadata}, DATA)), tmp_path
        )
        assert isinstance(outcome, AdapterSpec | AdapterRefusedError)


def test_a_directory_of_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.workers.adapters.folder._MAX_ENTRIES", 5)
    path = write(tmp_path / "a")
    for number in range(5):
        (path / f"{number}").touch()
    assert_refused(path, tmp_path, "not_peft")


FIELDS = [
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "bias", "rank_pattern", "alpha_pattern",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "alora_invocation_tokens",
    "base_model_name_or_path", "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "loftq_config", "fan_in_fan_out", "layer_replication", "megatron_config", "anything",
]  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["q_proj", "model.layers.0.self_attn.q_proj", ".*", "(", "lm_head", "embed_tokens", "all", "LORA"]
    )
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("hostile")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_any_value_of_any_field_is_served_or_refused(changes: dict[str, Any], directories: Path) -> None:
    outcome = attempt(write(directories / "config", CONFIG | changes), directories)
    if isinstance(outcome, AdapterRefusedError):
        assert outcome.reason and len(outcome.message) <= LONGEST_MESSAGE


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_weights_file_with_any_bytes_changed_is_served_or_refused(data: st.DataObject, directories: Path) -> None:
    content = bytearray(weights())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    outcome = attempt(write(directories / "weights", data=bytes(content)), directories)
    if isinstance(outcome, AdapterRefusedError):
        assert outcome.reason and len(outcome.message) <= LONGEST_MESSAGE


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.sampled_from([A, B, A.replace("layers.0", "layers.1"), "lm_head.weight", "x", "__metadata__"]),
        VALUES | st.builds(entry, st.lists(st.integers(-2, 9), max_size=3), st.integers(-5, 99), st.integers(-5, 99)),
        max_size=3,
    )
)
def test_any_header_is_served_or_refused(header: dict[str, Any], directories: Path) -> None:
    outcome = attempt(write(directories / "header", data=file_of(header, DATA)), directories)
    if isinstance(outcome, AdapterRefusedError):
        assert outcome.reason and len(outcome.message) <= LONGEST_MESSAGE
