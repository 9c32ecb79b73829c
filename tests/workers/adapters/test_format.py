"""An adapter directory is loaded exactly or refused with a reason, a path and the value at fault."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from lorafleet.workers.adapters import format as adapter_format
from lorafleet.workers.adapters import tensor_file
from lorafleet.workers.adapters.config import CONFIG_FILE
from lorafleet.workers.adapters.digest import AdapterHash, FileStamp
from lorafleet.workers.adapters.format import AdapterSpec, load_adapter, read_adapter_spec
from lorafleet.workers.adapters.modules import BaseShapes
from lorafleet.workers.adapters.weights_file import WEIGHTS_FILE
from lorafleet.workers.errors import AdapterRefusedError, AdapterUnavailableError

RANK = 4
BASE = BaseShapes(num_layers=2, linears={"q_proj": (8, 8), "v_proj": (8, 4), "down_proj": (12, 8)})
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM"}
A = "base_model.model.model.layers.{layer}.{linear}.lora_A.weight"
B = "base_model.model.model.layers.{layer}.{linear}.lora_B.weight"
Q0_A, Q0_B = A.format(layer=0, linear="self_attn.q_proj"), B.format(layer=0, linear="self_attn.q_proj")

Tensors = dict[str, torch.Tensor]


def tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    """q_proj of both layers and down_proj of the second, random."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for layer, linear in ((0, "self_attn.q_proj"), (1, "self_attn.q_proj"), (1, "mlp.down_proj")):
        num_in, num_out = BASE.linears[linear.split(".")[1]]
        made[A.format(layer=layer, linear=linear)] = torch.randn(RANK, num_in, generator=generator).to(dtype)
        made[B.format(layer=layer, linear=linear)] = torch.randn(num_out, RANK, generator=generator).to(dtype)
    return made


def write(path: Path, config: dict[str, Any] | None = None, weights: Tensors | None = None) -> Path:
    """An adapter directory: a good one, with config fields or all weights replaced."""
    path.mkdir(exist_ok=True)
    (path / CONFIG_FILE).write_text(json.dumps(CONFIG | (config or {})))
    save_file(tensors() if weights is None else weights, path / WEIGHTS_FILE)
    return path


def read(path: Path, max_lora_rank: int = 16) -> AdapterSpec:
    return read_adapter_spec(path, BASE, max_lora_rank=max_lora_rank)


def assert_refused(path: Path, reason: str, *named: str, max_lora_rank: int = 16) -> None:
    """The refusal has this reason code, and its message the path and everything in `named`."""
    with pytest.raises(AdapterRefusedError) as caught:
        read(path, max_lora_rank)
    assert caught.value.reason == reason
    for text in (str(path), *named):
        assert text in caught.value.message


def pickled() -> bytes:
    """The output of torch.save: a zip with a pickle."""
    buffer = io.BytesIO()
    torch.save(tensors(), buffer)
    return buffer.getvalue()


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "absent", "missing_directory")
    assert_refused(tmp_path / "file", "missing_directory")


def test_a_directory_without_an_adapter_config_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "not_peft", CONFIG_FILE)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON"),
        ("[1]", "list"),
        ("\ufeff{}", "JSON"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(text: str, named: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(text)
    assert_refused(tmp_path, "bad_config", CONFIG_FILE, named)


def test_a_config_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / CONFIG_FILE).write_bytes(b'{"r": "\xff"}')
    assert_refused(tmp_path, "bad_config", CONFIG_FILE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"r": 0}, "r=0"),
        ({"r": -1}, "r=-1"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": True}, "r=True"),
        ({"r": "4"}, "r='4'"),
        ({"r": None}, "r=None"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"lora_alpha": "8"}, "lora_alpha='8'"),
        ({"lora_alpha": True}, "lora_alpha=True"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
        ({"lora_alpha": 10**400}, "lora_alpha=an integer of 1329 bits"),
        ({"lora_alpha": 1e39}, "lora_alpha=1e+39"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern=['q_proj']"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0"),
        ({"rank_pattern": {"q_(proj": 2}}, "rank_pattern for 'q_(proj'"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern['q_proj']='4'"),
        ({"alpha_pattern": {"*": 4}}, "alpha_pattern for '*'"),
        ({"bias": "some"}, "bias='some'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head'"),
        ({"modules_to_save": [3]}, "modules_to_save=[3]"),
        ({"trainable_token_indices": 3}, "trainable_token_indices=3"),
        ({"trainable_token_indices": [3, 3]}, "[3, 3]"),
        ({"trainable_token_indices": [-1]}, "[-1]"),
        ({"trainable_token_indices": [True]}, "[True]"),
        ({"trainable_token_indices": {"lm_head": 3}}, "trainable_token_indices=3"),
        ({"alora_invocation_tokens": 7}, "alora_invocation_tokens=7"),
        ({"alora_invocation_tokens": [7, -1]}, "alora_invocation_tokens=[7, -1]"),
        ({"alora_invocation_tokens": [True]}, "alora_invocation_tokens=[True]"),
        ({"alora_invocation_tokens": "go"}, "alora_invocation_tokens='go'"),
    ],
)
def test_a_rank_or_alpha_that_is_no_usable_number_is_refused(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    assert_refused(write(tmp_path, change), "bad_config", CONFIG_FILE, named)


@pytest.mark.parametrize("peft_type", ["IA3", "LOHA", "lora", None])
def test_another_peft_method_is_refused(peft_type: str | None, tmp_path: Path) -> None:
    assert_refused(write(tmp_path, {"peft_type": peft_type}), "unsupported_peft_type", CONFIG_FILE, repr(peft_type))


@pytest.mark.parametrize(
    "change",
    [
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["experts"]},
        {"megatron_config": {"a": 1}},
        {"use_qalora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "PiSSA_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"a_field_of_tomorrow": 1},
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_than_is_applied_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    (name, value), *_ = change.items()
    assert_refused(write(tmp_path, change), "unsupported_feature", CONFIG_FILE, name, repr(value))


def test_a_rank_over_the_limit_is_refused_with_the_flag_that_lets_it_in(tmp_path: Path) -> None:
    write(tmp_path)
    assert_refused(tmp_path, "rank_too_large", "rank 4", "limit is 3", "--max-lora-rank 4.", max_lora_rank=3)
    assert read(tmp_path, max_lora_rank=4).lora_rank == RANK


def test_a_rank_over_the_limit_in_a_pattern_is_refused_with_the_module(tmp_path: Path) -> None:
    write(tmp_path, {"rank_pattern": {r"layers\.1\..*": 32}})
    assert_refused(tmp_path, "rank_too_large", "rank 32", "model.layers.1.mlp.down_proj", "--max-lora-rank 32.")


PATTERNS = {"q_proj": 2, r"1\.mlp\.down_proj": 3, "own_proj": 7, "layers.0": 7}


def test_patterns_say_rank_and_alpha_of_each_module_as_in_peft(tmp_path: Path) -> None:
    weights = tensors()
    for name, tensor in weights.items():
        rank = get_pattern_rank(name)
        weights[name] = (tensor[:rank] if "lora_A" in name else tensor[:, :rank]).contiguous()
    spec = read(
        write(tmp_path, {"rank_pattern": PATTERNS, "alpha_pattern": {"down_proj": 6, "0.self_attn.q_proj": 1}}, weights)
    )
    assert spec.lora_rank == 3
    loaded = load_adapter(spec, BASE, torch.float32).weights
    assert {key: (pair.a_RI.shape[0], pair.scaling) for key, pair in loaded.items()} == {
        (0, "q_proj"): (2, 0.5),
        (1, "q_proj"): (2, 4.0),
        (1, "down_proj"): (3, 2.0),
    }


def get_pattern_rank(name: str) -> int:
    """PEFT's own answer."""
    module = name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
    return PATTERNS.get(get_pattern_key(list(PATTERNS), module), RANK)


def test_an_alpha_in_a_pattern_changes_the_digest(tmp_path: Path) -> None:
    changed = read(write(tmp_path / "changed", {"alpha_pattern": {"down_proj": 9}}))
    assert changed.digest != read(write(tmp_path / "plain")).digest
    same = read(
        write(tmp_path / "same", {"alpha_pattern": {"down_proj": 8, "o_proj": 9}, "rank_pattern": {"o_proj": 9}})
    )
    assert same.digest == read(write(tmp_path / "plain")).digest


def test_invocation_tokens_are_part_of_the_digest_and_none_are_as_good_as_no_field(tmp_path: Path) -> None:
    plain = read(write(tmp_path / "plain"))
    activated = [
        read(write(tmp_path / str(i), {"alora_invocation_tokens": ids})) for i, ids in enumerate([[3, 4], [34]])
    ]
    assert [spec.config.invocation_tokens for spec in (plain, *activated)] == [(), (3, 4), (34,)]
    assert len({spec.digest for spec in (plain, *activated)}) == 3
    without: tuple[list[int] | None, ...] = None, []
    for i, nothing in enumerate(without):
        assert read(write(tmp_path / f"none-{i}", {"alora_invocation_tokens": nothing})).digest == plain.digest


def test_invocation_tokens_that_no_prompt_can_hold_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"alora_invocation_tokens": [3, 11]})
    assert read_adapter_spec(tmp_path, replace(BASE, vocab_size=12), max_lora_rank=RANK).config.invocation_tokens == (
        3,
        11,
    )
    with pytest.raises(AdapterRefusedError, match=r"the id 11; the base model's ids go from 0 to 10\.") as caught:
        read_adapter_spec(tmp_path, replace(BASE, vocab_size=11), max_lora_rank=RANK)
    assert caught.value.reason == "bad_config"


FUSED_BASE = BaseShapes(num_layers=1, linears={"q_proj": (8, 8), "k_proj": (8, 4), "v_proj": (8, 4), "o_proj": (8, 8)})
FUSED_A, FUSED_B = (name.format(layer=0, linear="self_attn.qkv_proj") for name in (A, B))


def test_a_fused_module_is_its_parts_with_one_a(tmp_path: Path) -> None:
    weights = {FUSED_A: torch.randn(RANK, 8), FUSED_B: torch.randn(16, RANK)}
    spec = read_adapter_spec(write(tmp_path, weights=weights), FUSED_BASE, max_lora_rank=RANK)
    loaded = load_adapter(spec, FUSED_BASE, torch.float32)
    assert loaded.num_bytes == 4 * (RANK * 8 + 16 * RANK), "A is kept once"
    assert list(loaded.weights) == [(0, "q_proj"), (0, "k_proj"), (0, "v_proj")]
    assert all(torch.equal(pair.a_RI, weights[FUSED_A]) for pair in loaded.weights.values())
    assert torch.equal(torch.cat([pair.b_RO for pair in loaded.weights.values()], dim=1), weights[FUSED_B].T)


def test_a_module_and_a_part_of_it_are_refused(tmp_path: Path) -> None:
    weights = {FUSED_A: torch.randn(RANK, 8), FUSED_B: torch.randn(16, RANK)}
    write(tmp_path, weights=weights | {Q0_A: torch.randn(RANK, 8), Q0_B: torch.randn(8, RANK)})
    with pytest.raises(AdapterRefusedError, match="qkv_proj and on q_proj of layer 0") as caught:
        read_adapter_spec(tmp_path, FUSED_BASE, max_lora_rank=RANK)
    assert caught.value.reason == "overlapping_targets"


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    assert_refused(tmp_path, "missing_weights", WEIGHTS_FILE)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_instead_of_safetensors_is_refused_unread(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / name)
    assert_refused(tmp_path, "pickle", name)


@pytest.mark.parametrize("content", [pickled(), b"\x80\x04\x95" + bytes(100)], ids=["zip", "bare"])
def test_a_pickle_under_the_name_of_safetensors_is_refused_unread(content: bytes, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    assert_refused(tmp_path, "pickle", WEIGHTS_FILE)


def huge_header(content: bytes) -> bytes:
    return struct.pack("<Q", 1 << 62) + content[8:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"garbage" * 100,
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: content + b"\0",
        huge_header,
    ],
    ids=["empty", "garbage", "truncated data", "truncated header", "a byte too many", "huge header"],
)
def test_a_broken_weights_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = write(tmp_path) / WEIGHTS_FILE
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(tmp_path, "bad_safetensors", WEIGHTS_FILE)


def test_an_unreadable_weights_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)

    def deny(*args: object, **kwargs: object) -> None:
        (tmp_path / WEIGHTS_FILE).unlink(missing_ok=True)  # gone between the check and the read
        raise PermissionError("not allowed")

    monkeypatch.setattr(tensor_file, "safe_open", deny)
    assert_refused(tmp_path, "bad_safetensors", WEIGHTS_FILE, "not allowed")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.embed_tokens.lora_A.weight",
        "base_model.model.lm_head.lora_embedding_A",
        "base_model.model.lm_head.bias",
        "base_model.model.model.layers.0.input_layernorm.weight",
        "base_model.model.model.norm.weight",
        "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.experts.0.down_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
        "base_model.model.model.layers.-1.self_attn.q_proj.lora_A.weight",
        "vision.model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_that_is_not_lora_on_a_served_linear_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, weights=tensors() | {name: torch.zeros(RANK, 8)})
    assert_refused(tmp_path, "unsupported_target", WEIGHTS_FILE, name, "q_proj, v_proj, down_proj")


def test_a_layer_that_the_base_model_lacks_is_refused(tmp_path: Path) -> None:
    name = A.format(layer=2, linear="self_attn.q_proj")
    write(tmp_path, weights=tensors() | {name: torch.zeros(RANK, 8)})
    assert_refused(tmp_path, "unknown_layer", WEIGHTS_FILE, name, "2 layers")


@pytest.mark.parametrize(("gone", "named"), [(Q0_A, "lora_B of layer 0 q_proj"), (Q0_B, "lora_A of layer 0 q_proj")])
def test_half_a_pair_is_refused(gone: str, named: str, tmp_path: Path) -> None:
    weights = tensors()
    del weights[gone]
    assert_refused(write(tmp_path, weights=weights), "missing_pair", WEIGHTS_FILE, named)


MODULE = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("config", "name", "field"),
    [
        ({}, "lora_magnitude_vector", "use_dora"),
        ({}, "lora_B.bias", "lora_bias"),
        ({}, "base_layer.bias", "bias"),
        ({"use_dora": True}, None, "use_dora"),
        ({"lora_bias": True}, None, "lora_bias"),
    ],
)
def test_a_config_and_tensors_that_disagree_are_refused(
    config: dict[str, Any], name: str | None, field: str, tmp_path: Path
) -> None:
    more = {} if name is None else {MODULE + name: torch.ones(8)}
    write(tmp_path, config, tensors() | more)
    assert_refused(tmp_path, "config_mismatch", WEIGHTS_FILE, "layer 0 q_proj", CONFIG_FILE, field)


@pytest.mark.parametrize("end", ["", ".weight", ".default.weight"])
def test_vectors_are_kept_in_float32_and_accounted(end: str, tmp_path: Path) -> None:
    """All styles of keys that PEFT has used."""
    values = torch.rand(3, 8) * 3
    modules = {name: tensor for name, tensor in tensors().items() if name.startswith(MODULE)}
    names = (f"lora_magnitude_vector{end}", "lora_B.bias", "base_layer.bias")
    weights = modules | {MODULE + name: values[i].clone() for i, name in enumerate(names)}
    spec = read(write(tmp_path, {"use_dora": True, "lora_bias": True, "bias": "all"}, weights))
    assert (spec.num_elements, spec.num_vector_elements) == (2 * 8 * RANK, 24)
    adapter = load_adapter(spec, BASE, torch.bfloat16)
    change = adapter.weights[0, "q_proj"]
    assert change.magnitude_O is not None and change.b_bias_O is not None and change.bias_O is not None
    assert torch.equal(torch.stack([change.magnitude_O, change.b_bias_O, change.bias_O]), values)
    assert adapter.num_bytes == 2 * spec.num_elements + 12 * 24
    held = {
        t.data_ptr(): t.nbytes()
        for t in (tensor.untyped_storage() for tensor in change if isinstance(tensor, torch.Tensor))
    }
    assert sum(held.values()) <= adapter.num_bytes, "no vector keeps the file's buffer in memory"


@pytest.mark.parametrize("shape", [(9,), (8, 1), ()])
def test_a_vector_of_another_shape_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    name = MODULE + "base_layer.bias"
    write(tmp_path, {"bias": "all"}, tensors() | {name: torch.zeros(shape)})
    assert_refused(tmp_path, "wrong_shape", WEIGHTS_FILE, name, str(list(shape)))


def test_biases_alone_are_no_lora(tmp_path: Path) -> None:
    write(tmp_path, {"bias": "all"}, {MODULE + "base_layer.bias": torch.zeros(8)})
    assert_refused(tmp_path, "no_weights", WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        (Q0_A, (2, 8), "rank_mismatch"),
        (Q0_B, (8, 2), "rank_mismatch"),
        (Q0_A, (RANK, 9), "wrong_shape"),
        (Q0_B, (9, RANK), "wrong_shape"),
        (Q0_A, (8, RANK), "wrong_shape"),
        (Q0_A, (RANK * 8,), "wrong_shape"),
        (Q0_A, (RANK, 8, 1), "wrong_shape"),
        (Q0_A, (), "wrong_shape"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(name: str, shape: tuple[int, ...], reason: str, tmp_path: Path) -> None:
    write(tmp_path, weights=tensors() | {name: torch.zeros(shape)})
    assert_refused(tmp_path, reason, WEIGHTS_FILE, name, str(list(shape)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    weights = tensors()
    weights[B.format(layer=1, linear="mlp.down_proj")][3, 1] = value
    assert_refused(
        write(tmp_path, weights=weights), "non_finite", WEIGHTS_FILE, "NaN or infinite", "lora_B of layer 1 down_proj"
    )


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    assert_refused(write(tmp_path, weights={}), "no_weights", WEIGHTS_FILE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_is_not_read_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = tensors() | {Q0_A: torch.zeros(RANK, 8).to(dtype)}
    assert_refused(write(tmp_path, weights=weights), "unsupported_dtype", WEIGHTS_FILE, Q0_A, str(dtype))


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    twin = Q0_A.replace("lora_A.weight", "lora_A.default.weight")
    write(tmp_path, weights=tensors() | {twin: torch.zeros(RANK, 8)})
    assert_refused(tmp_path, "bad_safetensors", WEIGHTS_FILE, Q0_A, twin)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace(".weight", ".my-adapter.weight"),
        lambda name: name.removeprefix("base_model.model."),
    ],
    ids=["default", "named", "no prefix"],
)
def test_every_key_style_of_peft_is_the_same_adapter(rename: Callable[[str], str], tmp_path: Path) -> None:
    plain = read(write(tmp_path / "plain"))
    renamed = write(tmp_path / "renamed", weights={rename(name): value for name, value in tensors().items()})
    spec = read(renamed)
    assert spec == replace(plain, path=renamed, files=spec.files)
    ours, theirs = (load_adapter(one, BASE, torch.float32).weights for one in (plain, spec))
    assert ours.keys() == theirs.keys()
    for key in ours:
        for mine, other in zip(ours[key], theirs[key], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"base_model_name_or_path": "org/base"},
        {"lora_dropout": 0.5},
        {"target_modules": ["q_proj"]},
        {"inference_mode": True},
        {"init_lora_weights": "gaussian"},
        {"use_dora": False, "rank_pattern": {}, "modules_to_save": None, "a_field_of_tomorrow": None},
        {"use_rslora": False},
        {"lora_alpha": 8.0},
    ],
    ids=str,
)
def test_a_config_field_that_changes_nothing_does_not_change_the_digest(change: dict[str, Any], tmp_path: Path) -> None:
    assert read(write(tmp_path / "changed", change)).digest == read(write(tmp_path / "plain")).digest


def test_the_order_of_tensors_in_the_file_does_not_change_the_digest(tmp_path: Path) -> None:
    plain = read(write(tmp_path / "plain"))
    weights = tensors()
    header: dict[str, Any] = {}
    data = b""
    for name in reversed(weights):
        raw = weights[name].numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(weights[name].shape), "data_offsets": offsets}
        data += raw
    encoded = json.dumps(header).encode()
    backwards = write(tmp_path / "backwards")
    (backwards / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    assert read(backwards).digest == plain.digest


def flip_a_bit(weights: Tensors) -> None:
    weights[Q0_B].view(torch.int32)[0, 0] ^= 1


def swap_layers(weights: Tensors) -> None:
    other = A.format(layer=1, linear="self_attn.q_proj")
    weights[Q0_A], weights[other] = weights[other], weights[Q0_A]


def halve(weights: Tensors) -> None:
    for name in weights:
        weights[name] = weights[name].half()


@pytest.mark.parametrize("change", [flip_a_bit, swap_layers, halve])
def test_a_change_of_the_weights_changes_the_digest(change: Callable[[Tensors], None], tmp_path: Path) -> None:
    weights = tensors()
    change(weights)
    assert read(write(tmp_path / "changed", weights=weights)).digest != read(write(tmp_path / "plain")).digest


@pytest.mark.parametrize(
    ("change", "scaling"),
    [({}, 2.0), ({"lora_alpha": 9}, 2.25), ({"use_rslora": True}, 4.0), ({"lora_alpha": 0}, 0.0)],
    ids=str,
)
def test_alpha_and_rslora_say_the_scaling_and_change_the_digest(
    change: dict[str, Any], scaling: float, tmp_path: Path
) -> None:
    spec = read(write(tmp_path / "changed", change))
    assert spec.config.scaling("model.layers.0.self_attn.q_proj") == scaling
    assert (spec.digest == read(write(tmp_path / "plain")).digest) is (not change)


def test_a_spec_says_what_an_adapter_takes(tmp_path: Path) -> None:
    spec = read(write(tmp_path, {"base_model_name_or_path": "org/base"}))
    assert (spec.path, spec.lora_rank, spec.config.base_model_name) == (tmp_path, RANK, "org/base")
    assert spec.num_elements == sum(tensor.numel() for tensor in tensors().values())
    assert load_adapter(spec, BASE, torch.bfloat16).num_bytes == 2 * spec.num_elements


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_loaded_weights_are_the_files_in_memory_of_their_own(stored: torch.dtype, tmp_path: Path) -> None:
    file = write(tmp_path, weights=tensors(stored)) / WEIGHTS_FILE
    adapter = load_adapter(read(tmp_path), BASE, torch.float32)
    expected = {name: tensor.to(torch.float32, copy=True) for name, tensor in load_file(file).items()}
    with file.open("r+b") as opened:  # in place: a memory map would see it
        opened.write(b"\xff" * file.stat().st_size)
    assert set(adapter.weights) == {(0, "q_proj"), (1, "q_proj"), (1, "down_proj")}
    for (layer, linear), (a, b, scaling, *vectors) in adapter.weights.items():
        assert scaling == 2.0 and vectors == [None, None, None]
        path = f"mlp.{linear}" if linear == "down_proj" else f"self_attn.{linear}"
        torch.testing.assert_close(a, expected[A.format(layer=layer, linear=path)], rtol=0, atol=0)
        torch.testing.assert_close(b, expected[B.format(layer=layer, linear=path)].T, rtol=0, atol=0)
        assert a.is_contiguous() and b.is_contiguous(), "what a slot copies lies in one piece"


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_loaded_weights_share_one_buffer_of_the_size_that_is_accounted(stored: torch.dtype, tmp_path: Path) -> None:
    adapter = load_adapter(read(write(tmp_path, weights=tensors(stored))), BASE, torch.bfloat16)
    storages = [tensor.untyped_storage() for a, b, *_ in adapter.weights.values() for tensor in (a, b)]
    assert len({storage.data_ptr() for storage in storages}) == 1
    assert storages[0].nbytes() == adapter.num_bytes


def test_a_file_of_mixed_dtypes_is_loaded_wherever_its_tensors_lie(tmp_path: Path) -> None:
    """A file unlike those safetensors writes: the float32 tensor follows three bfloat16 ones, off its alignment."""
    base = BaseShapes(num_layers=1, linears={"q_proj": (3, 3)})
    a, b = torch.tensor([[1.0, 2.0, 3.0]]).bfloat16(), torch.tensor([[0.1], [0.2], [0.3]])
    header = {
        Q0_A: {"dtype": "BF16", "shape": [1, 3], "data_offsets": [0, 6]},
        Q0_B: {"dtype": "F32", "shape": [3, 1], "data_offsets": [6, 18]},
    }
    encoded = json.dumps(header).encode()
    write(tmp_path, {"r": 1})
    (tmp_path / WEIGHTS_FILE).write_bytes(
        struct.pack("<Q", len(encoded)) + encoded + a.view(torch.int16).numpy().tobytes() + b.numpy().tobytes()
    )
    spec = read_adapter_spec(tmp_path, base, max_lora_rank=1)
    assert spec.num_elements == 6
    loaded_a, loaded_b, *_ = load_adapter(spec, base, torch.float32).weights[0, "q_proj"]
    assert loaded_a.tolist() == a.tolist()
    assert loaded_b.tolist() == b.T.tolist()


def remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def change_weights(path: Path) -> None:
    weights = tensors()
    flip_a_bit(weights)
    save_file(weights, path / WEIGHTS_FILE)


def truncate(path: Path) -> None:
    (path / WEIGHTS_FILE).write_bytes((path / WEIGHTS_FILE).read_bytes()[:-4])


def overwrite_in_place(path: Path) -> None:
    """Write other weights of the same size into the same file, with the modification time set back."""
    file = path / WEIGHTS_FILE
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        (last,) = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def spoil(path: Path) -> None:
    weights = tensors()
    weights[Q0_A][0, 0] = torch.nan
    save_file(weights, path / WEIGHTS_FILE)


@pytest.mark.parametrize("change", [remove, change_weights, truncate, overwrite_in_place, spoil])
def test_an_adapter_that_changed_since_it_was_verified_is_unavailable_and_its_directory_is_not_named(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    spec = read(write(tmp_path / "adapter"))
    change(spec.path)
    with pytest.raises(AdapterUnavailableError, match="registered") as caught:
        load_adapter(spec, BASE, torch.float32)
    assert str(tmp_path) not in caught.value.message


def test_values_that_overflow_in_float16_are_refused_with_the_flag_that_helps(tmp_path: Path) -> None:
    weights = tensors()
    weights[Q0_B][1, 1] = 70_000.0
    spec = read(write(tmp_path, weights=weights))
    with pytest.raises(
        AdapterRefusedError, match=r"float16 in lora_B of layer 0 q_proj.*--lora-dtype bfloat16"
    ) as info:
        load_adapter(spec, BASE, torch.float16)
    assert info.value.reason == "non_finite"
    assert load_adapter(spec, BASE, torch.bfloat16).weights[0, "q_proj"][1][1, 1] > 6e4


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> list[AdapterHash]:
    """Every hash computed from now on."""
    made: list[AdapterHash] = []

    class Counted(AdapterHash):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(adapter_format, "AdapterHash", Counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_that_did_not_change_is_hashed_once(
    dtype: torch.dtype, tmp_path: Path, hashes: list[AdapterHash]
) -> None:
    spec = read(write(tmp_path))
    for _ in range(3):
        assert load_adapter(spec, BASE, dtype).digest == spec.digest
    assert len(hashes) == 1


def replace_by_a_copy(path: Path) -> None:
    copy = path / "copy"
    copy.write_bytes((path / WEIGHTS_FILE).read_bytes())
    copy.replace(path / WEIGHTS_FILE)


def rewrite(path: Path) -> None:
    (path / WEIGHTS_FILE).write_bytes((path / WEIGHTS_FILE).read_bytes())


def touch(path: Path) -> None:
    (path / WEIGHTS_FILE).touch()


@pytest.mark.parametrize("change", [replace_by_a_copy, rewrite, touch])
def test_a_file_that_may_have_changed_is_hashed_again_and_loads_if_it_is_the_same(
    change: Callable[[Path], None], tmp_path: Path, hashes: list[AdapterHash]
) -> None:
    spec = read(write(tmp_path))
    expected = load_adapter(spec, BASE, torch.float32).weights
    change(tmp_path)
    loaded = load_adapter(spec, BASE, torch.float32).weights
    assert len(hashes) == 2
    for key, pair in expected.items():
        for mine, other in zip(pair, loaded[key], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_a_stamp_that_proves_nothing_is_not_relied_on(
    tmp_path: Path, hashes: list[AdapterHash], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(FileStamp, "settle", lambda self: False)
        spec = read(write(tmp_path))
    assert all(file.stamp is None for file in spec.files)
    load_adapter(spec, BASE, torch.float32)
    assert len(hashes) == 2


Meddle = Callable[[Callable[[], object]], None]


@pytest.fixture
def meddle(monkeypatch: pytest.MonkeyPatch) -> Meddle:
    """Run something during the next read of a weights file: after its opening, before any tensor is read."""
    read_tensors = tensor_file._read

    def once(happen: Callable[[], object]) -> None:
        def read_them(*args: Any) -> Any:
            monkeypatch.setattr(tensor_file, "_read", read_tensors)
            happen()
            return read_tensors(*args)

        monkeypatch.setattr(tensor_file, "_read", read_them)

    return once


@pytest.mark.parametrize("change", [overwrite_in_place, rewrite, replace_by_a_copy])
def test_a_file_that_changes_while_it_is_registered_is_refused(
    change: Callable[[Path], None], tmp_path: Path, meddle: Meddle
) -> None:
    write(tmp_path)
    meddle(lambda: change(tmp_path))
    assert_refused(tmp_path, "changed_while_read", WEIGHTS_FILE)


def test_a_file_that_changes_while_it_is_loaded_is_unavailable(tmp_path: Path, meddle: Meddle) -> None:
    spec = read(write(tmp_path))
    meddle(lambda: overwrite_in_place(tmp_path))
    with pytest.raises(AdapterUnavailableError, match="changed since"):
        load_adapter(spec, BASE, torch.float32)


def test_a_file_that_is_replaced_while_it_is_loaded_is_read_as_it_was(tmp_path: Path, meddle: Meddle) -> None:
    spec = read(write(tmp_path / "adapter"))
    other = write(tmp_path / "other", weights=tensors(torch.float16))
    expected = load_adapter(spec, BASE, torch.float32).weights
    meddle(lambda: (other / WEIGHTS_FILE).replace(spec.path / WEIGHTS_FILE))
    loaded = load_adapter(spec, BASE, torch.float32).weights
    for key, pair in loaded.items():
        torch.testing.assert_close(pair, expected[key], rtol=0, atol=0)
    with pytest.raises(AdapterUnavailableError, match="changed since"):
        load_adapter(spec, BASE, torch.float32)
