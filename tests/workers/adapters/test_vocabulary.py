"""Allowed changes of embedding, head and norms, and refused ones: config and files must agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafleet.workers.adapters.config import CONFIG_FILE
from lorafleet.workers.adapters.format import AdapterSpec, load_adapter, read_adapter_spec
from lorafleet.workers.adapters.modules import BaseShapes
from lorafleet.workers.adapters.vocabulary import NEW_EMBEDDINGS_FILE
from lorafleet.workers.adapters.weights_file import WEIGHTS_FILE
from lorafleet.workers.errors import AdapterRefusedError, AdapterUnavailableError

V, H, R = 10, 8, 2
NORMS = {"input_layernorm": H, "post_attention_layernorm": H, "norm": H}
UNTIED = BaseShapes(
    num_layers=2, linears={"q_proj": (H, H)}, norms=NORMS, hidden_size=H, vocab_size=V, tie_embeddings=False
)
TIED = BaseShapes(
    num_layers=2, linears={"q_proj": (H, H)}, norms=NORMS, hidden_size=H, vocab_size=V, tie_embeddings=True
)
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": R, "lora_alpha": 4}
Q = "model.layers.0.self_attn.q_proj."
LORA = {Q + "lora_A.weight": (R, H), Q + "lora_B.weight": (H, R)}
EMBEDDING, HEAD = "model.embed_tokens.", "lm_head."
LORA_EMBEDDING = {EMBEDDING + "lora_embedding_A": (R, V), EMBEDDING + "lora_embedding_B": (H, R)}
LORA_HEAD = {HEAD + "lora_A.weight": (R, H), HEAD + "lora_B.weight": (V, R)}
OWN_EMBEDDING, OWN_HEAD = {EMBEDDING + "weight": (V, H)}, {HEAD + "weight": (V, H)}
TOKENS_EMBEDDING = {EMBEDDING + "token_adapter.trainable_tokens_delta": (2, H)}
TOKENS_HEAD = {HEAD + "token_adapter.trainable_tokens_delta": (2, H)}
WIDE = {EMBEDDING + "weight": (V + 3, H), HEAD + "weight": (V + 3, H)}

Shapes = Mapping[str, tuple[int, ...]]


def write(
    path: Path, config: dict[str, Any] | None = None, shapes: Shapes | None = None, new: Shapes | None = None
) -> Path:
    """An adapter with LoRA on a linear, and more."""
    path.mkdir(exist_ok=True)
    (path / CONFIG_FILE).write_text(json.dumps(CONFIG | (config or {})))
    generator = torch.Generator().manual_seed(1)
    made = {name: torch.randn(shape, generator=generator) for name, shape in {**LORA, **(shapes or {})}.items()}
    save_file({f"base_model.model.{name}": tensor for name, tensor in made.items()}, path / WEIGHTS_FILE)
    if new is not None:
        save_file({name: torch.randn(shape, generator=generator) for name, shape in new.items()}, path / NEW)
    return path


NEW = NEW_EMBEDDINGS_FILE


def read(path: Path, base: BaseShapes = UNTIED, max_extra_vocab: int = 4) -> AdapterSpec:
    return read_adapter_spec(path, base, max_lora_rank=8, max_extra_vocab=max_extra_vocab)


def assert_refused(path: Path, reason: str, *named: str, base: BaseShapes = UNTIED) -> None:
    with pytest.raises(AdapterRefusedError) as caught:
        read(path, base)
    assert caught.value.reason == reason, caught.value.message
    for text in (str(path), *named):
        assert text in caught.value.message


SAVED = {"modules_to_save": ["embed_tokens"]}
SAVED_BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
TRAINED = {"trainable_token_indices": [3, 5]}
NEW_BOTH = {"input_embeddings": (2, H), "output_embeddings": (2, H)}
REFUSED: dict[str, tuple[dict[str, Any], Shapes, Shapes | None, str, str]] = {
    "a linear saved whole": (
        {"modules_to_save": ["q_proj"]},
        {Q + "weight": (H, H)},
        None,
        "unsupported_target",
        "q_proj",
    ),
    "a layer saved whole": ({"modules_to_save": ["self_attn"]}, {}, None, "unsupported_target", "self_attn"),
    "no such module": ({"modules_to_save": ["score"]}, {}, None, "unsupported_target", "score"),
    "a saved module is missing": (SAVED, {}, None, "config_mismatch", "embed_tokens"),
    "one of two saved modules is missing": (SAVED_BOTH, OWN_EMBEDDING, None, "config_mismatch", "lm_head"),
    "saved as nobody asked": ({}, {HEAD + "modules_to_save.weight": (V, H)}, None, "config_mismatch", "lm_head"),
    "a saved norm is missing": (
        {"modules_to_save": ["input_layernorm"]},
        {"model.layers.0.input_layernorm.weight": (H,)},
        None,
        "config_mismatch",
        "model.layers.1.input_layernorm",
    ),
    "a norm that nobody asked for": ({}, {"model.norm.weight": (H,)}, None, "config_mismatch", "model.norm"),
    "a norm of a layer too many": (
        {"modules_to_save": ["norm"]},
        {"model.layers.2.input_layernorm.weight": (H,)},
        None,
        "unknown_layer",
        "2 layers",
    ),
    "a norm of another size": (
        {"modules_to_save": ["model.norm"]},
        {"model.norm.weight": (H + 1,)},
        None,
        "wrong_shape",
        "model.norm.weight",
    ),
    "half of LoRA on the embedding": (
        {},
        {EMBEDDING + "lora_embedding_A": (R, V)},
        None,
        "missing_pair",
        "lora_A of embed_tokens",
    ),
    "half of LoRA on the head": ({}, {HEAD + "lora_B.weight": (V, R)}, None, "missing_pair", "lora_B of lm_head"),
    "LoRA for another vocabulary": (
        {},
        {EMBEDDING + "lora_embedding_A": (R, V + 1), EMBEDDING + "lora_embedding_B": (H, R)},
        None,
        "wrong_shape",
        "lora_embedding_A",
    ),
    "LoRA of another rank": (
        {},
        {HEAD + "lora_A.weight": (R + 1, H), HEAD + "lora_B.weight": (V, R + 1)},
        None,
        "rank_mismatch",
        "lm_head",
    ),
    "a rank over the limit": ({"rank_pattern": {"lm_head": 9}}, LORA_HEAD, None, "rank_too_large", "lm_head"),
    "a bias of the embedding": (
        {"lora_bias": True},
        {Q + "lora_B.bias": (H,), **LORA_EMBEDDING},
        None,
        "config_mismatch",
        "embed_tokens",
    ),
    "a magnitude that nobody asked for": (
        {},
        {**LORA_HEAD, HEAD + "lora_magnitude_vector": (V,)},
        None,
        "config_mismatch",
        "use_dora",
    ),
    "LoRA and a whole weight": (
        SAVED,
        {**LORA_EMBEDDING, **OWN_EMBEDDING},
        None,
        "overlapping_targets",
        "embed_tokens",
    ),
    "LoRA and the table beside it": ({}, {**LORA_HEAD, **OWN_HEAD}, None, "overlapping_targets", "lm_head"),
    "LoRA and trained tokens": (
        TRAINED,
        {**LORA_EMBEDDING, **TOKENS_EMBEDDING},
        None,
        "overlapping_targets",
        "embed_tokens",
    ),
    "trained tokens and a whole weight": (
        SAVED | TRAINED,
        {**OWN_EMBEDDING, **TOKENS_EMBEDDING},
        None,
        "overlapping_targets",
        "embed_tokens",
    ),
    "trained tokens are missing": (TRAINED, {}, None, "config_mismatch", "embed_tokens"),
    "trained tokens that nobody asked for": ({}, TOKENS_HEAD, None, "config_mismatch", "lm_head"),
    "trained tokens of other number": (
        {"trainable_token_indices": [1, 2, 3]},
        TOKENS_EMBEDDING,
        None,
        "config_mismatch",
        "trainable_token_indices",
    ),
    "trained tokens of another module": (
        {"trainable_token_indices": {"q_proj": [3]}},
        {},
        None,
        "unsupported_target",
        "q_proj",
    ),
    "trained tokens twice": (
        {"trainable_token_indices": {"embed_tokens": [3, 5], "model.embed_tokens": [3, 6]}},
        TOKENS_EMBEDDING,
        None,
        "bad_config",
        "embed_tokens",
    ),
    "a trained token behind the vocabulary": (
        {"trainable_token_indices": [3, V + 1]},
        TOKENS_EMBEDDING,
        None,
        "vocab_mismatch",
        f"{V + 1}",
    ),
    "a trained token that the head lacks": (
        {"trainable_token_indices": [3, V]},
        TOKENS_EMBEDDING,
        None,
        "vocab_mismatch",
        f"{V + 1} ids in embed_tokens",
    ),
    "a smaller vocabulary": (
        {},
        {EMBEDDING + "weight": (V - 1, H), HEAD + "weight": (V - 1, H)},
        None,
        "vocab_too_small",
        f"{V - 1} rows",
    ),
    "a larger vocabulary than allowed": (
        {},
        {EMBEDDING + "weight": (V + 5, H), HEAD + "weight": (V + 5, H)},
        None,
        "vocab_too_large",
        "--lora-extra-vocab-size 5",
    ),
    "a larger embedding alone": (SAVED, {EMBEDDING + "weight": (V + 1, H)}, None, "vocab_mismatch", "lm_head"),
    "a larger head alone": ({}, {HEAD + "weight": (V + 1, H)}, None, "vocab_mismatch", "embed_tokens"),
    "rows of another width": ({}, {**WIDE, HEAD + "weight": (V + 3, H + 1)}, None, "wrong_shape", "lm_head"),
    "a table without rows": ({}, {HEAD + "weight": (0, H)}, None, "wrong_shape", "lm_head"),
    "new embeddings of another width": ({}, {}, {"input_embeddings": (2, H + 1)}, "wrong_shape", "embed_tokens"),
    "new embeddings under another name": ({}, {}, {"embed_tokens": (2, H)}, "unsupported_target", "embed_tokens"),
    "new embeddings of the input alone": ({}, {}, {"input_embeddings": (2, H)}, "vocab_mismatch", "lm_head"),
    "more new embeddings than allowed": (
        {},
        {},
        {"input_embeddings": (5, H), "output_embeddings": (5, H)},
        "vocab_too_large",
        "--lora-extra-vocab-size 5",
    ),
    "new embeddings beside a whole table": (SAVED_BOTH, WIDE, NEW_BOTH, "overlapping_targets", NEW_EMBEDDINGS_FILE),
}


@pytest.mark.parametrize(("config", "shapes", "new", "reason", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_applied_is_refused_with_a_reason(
    config: dict[str, Any], shapes: Shapes, new: Shapes | None, reason: str, named: str, tmp_path: Path
) -> None:
    assert_refused(write(tmp_path, config, shapes, new), reason, named)


def test_where_the_base_ties_its_tables_trained_tokens_and_an_own_head_are_refused(tmp_path: Path) -> None:
    """The trained tokens belong to the head too."""
    write(tmp_path, {"modules_to_save": ["lm_head"]} | TRAINED, {**OWN_HEAD, **TOKENS_EMBEDDING})
    read(tmp_path)
    assert_refused(tmp_path, "overlapping_targets", "lm_head", base=TIED)


@pytest.mark.parametrize("name", ["new_embeddings.bin", "new_embeddings.pt"])
def test_pickled_new_embeddings_are_refused_unread(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert_refused(tmp_path, "pickle", name)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "bad_safetensors"), (b"PK\x03\x04", "pickle"), (b"\x80\x04.", "pickle")]
)
def test_broken_new_embeddings_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / NEW).write_bytes(content)
    assert_refused(tmp_path, reason, NEW)


def test_a_file_of_new_embeddings_under_another_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "new_embeddings_2.safetensors").touch()
    assert_refused(tmp_path, "unsupported_feature", "new_embeddings_2.safetensors")


@pytest.mark.parametrize("file", [WEIGHTS_FILE, NEW])
def test_rows_that_are_not_finite_are_refused(file: str, tmp_path: Path) -> None:
    write(tmp_path, TRAINED, TOKENS_EMBEDDING, NEW_BOTH)
    weights = load_file(tmp_path / file)
    rows = next(tensor for name, tensor in weights.items() if "tokens" in name or "input" in name)
    rows[1, 1] = torch.nan
    save_file(weights, tmp_path / file)
    assert_refused(tmp_path, "non_finite", "embed_tokens")


def test_two_tensors_of_one_place_must_be_equal(tmp_path: Path) -> None:
    """PEFT saves a table under several names if the vocabulary was resized."""
    names = ("embed_tokens.weight", "embed_tokens.modules_to_save.weight", "embed_tokens.original_module.weight")
    shapes = {f"model.{name}": (V + 1, H) for name in names} | {HEAD + "weight": (V + 1, H)}
    write(tmp_path, SAVED, shapes)
    assert_refused(tmp_path, "bad_safetensors", "embed_tokens")
    weights = load_file(tmp_path / WEIGHTS_FILE)
    weights[f"base_model.model.model.{names[1]}"] = weights[f"base_model.model.model.{names[0]}"].clone()
    save_file(weights, tmp_path / WEIGHTS_FILE)
    spec = read(tmp_path)
    assert spec.vocab_size == V + 1
    assert spec.num_elements == 2 * R * H + 2 * (V + 1) * H, "what is not used is not kept"


def test_where_the_base_ties_its_tables_their_base_weights_are_one(tmp_path: Path) -> None:
    write(tmp_path, {}, WIDE)
    assert read(tmp_path).vocab_size == V + 3
    assert_refused(tmp_path, "bad_safetensors", "embed_tokens", "lm_head", base=TIED)
    write(tmp_path, {}, {HEAD + "weight": (V + 3, H)})
    tables = load_adapter(read(tmp_path, TIED), TIED, torch.float32).tables
    assert tables["embed_tokens"].weight_VH is tables["lm_head"].weight_VH


def test_where_the_base_ties_its_tables_an_own_one_is_of_the_named_module_alone(tmp_path: Path) -> None:
    write(tmp_path, SAVED, OWN_EMBEDDING)
    tables = load_adapter(read(tmp_path, TIED), TIED, torch.float32).tables
    assert list(tables) == ["embed_tokens"]
    plain = read(tmp_path, TIED).digest
    write(tmp_path, SAVED | {"ensure_weight_tying": True}, OWN_EMBEDDING)
    spec = read(tmp_path, TIED)
    tables = load_adapter(spec, TIED, torch.float32).tables
    assert tables["embed_tokens"].weight_VH is tables["lm_head"].weight_VH is not None
    assert spec.digest != plain, "the mathematics differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_memory_is_what_is_accounted(dtype: torch.dtype, tmp_path: Path) -> None:
    shapes = {**WIDE, **TOKENS_EMBEDDING, **LORA_HEAD, HEAD + "lora_B.weight": (V + 3, R)}
    shapes[HEAD + "base_layer.weight"] = shapes.pop(HEAD + "weight")
    spec = read(write(tmp_path, TRAINED, shapes))
    adapter = load_adapter(spec, UNTIED, dtype)
    assert spec.num_elements == 2 * R * H + 2 * (V + 3) * H + 2 * H + R * (V + 3 + H)
    assert adapter.num_bytes == spec.num_elements * dtype.itemsize
    embedding, head = adapter.tables["embed_tokens"], adapter.tables["lm_head"]
    assert embedding.weight_VH is not None and head.weight_VH is not None and head.lora is not None
    tensors = [embedding.weight_VH, head.weight_VH, head.lora.a_RI, head.lora.b_RO, embedding.rows[0][1]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert tensors[0].untyped_storage().nbytes() == adapter.num_bytes
    assert embedding.rows[0][0] == (3, 5)
    stored = load_file(tmp_path / WEIGHTS_FILE)["base_model.model.lm_head.lora_B.weight"]
    torch.testing.assert_close(head.lora.b_RO, stored.T.to(dtype), rtol=0, atol=0)


def test_norms_of_its_own_are_kept_in_float32(tmp_path: Path) -> None:
    shapes: Shapes = {f"model.layers.{layer}.input_layernorm.weight": (H,) for layer in (0, 1)}
    adapter = load_adapter(
        read(write(tmp_path, {"modules_to_save": ["input_layernorm"]}, shapes)), UNTIED, torch.bfloat16
    )
    assert adapter.num_bytes == 2 * 2 * R * H + 4 * 2 * H
    stored = load_file(tmp_path / WEIGHTS_FILE)
    for layer in (0, 1):
        expected = stored[f"base_model.model.model.layers.{layer}.input_layernorm.weight"]
        assert torch.equal(adapter.norm_weights[layer, "input_layernorm"], expected)
    assert set(adapter.norm_weights) == {(0, "input_layernorm"), (1, "input_layernorm")}


def other_indices(path: Path) -> None:
    config = json.loads((path / CONFIG_FILE).read_text())
    config["trainable_token_indices"] = [5, 3]
    (path / CONFIG_FILE).write_text(json.dumps(config))


def other_rows(path: Path) -> None:
    weights = load_file(path / WEIGHTS_FILE)
    weights["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"][0, 0] += 1
    save_file(weights, path / WEIGHTS_FILE)


def other_new_rows(path: Path) -> None:
    weights = load_file(path / NEW)
    weights["output_embeddings"][0, 0] += 1
    save_file(weights, path / NEW)


def no_new_rows(path: Path) -> None:
    (path / NEW).unlink()


@pytest.mark.parametrize("change", [other_indices, other_rows, other_new_rows, no_new_rows])
def test_whatever_changes_the_mathematics_changes_the_digest(change: Callable[[Path], None], tmp_path: Path) -> None:
    spec = read(write(tmp_path, TRAINED, TOKENS_EMBEDDING, NEW_BOTH))
    change(tmp_path)
    assert read(tmp_path).digest != spec.digest
    if change is not other_indices:  # the config was read at registration
        with pytest.raises(AdapterUnavailableError):
            load_adapter(spec, UNTIED, torch.float32)


def test_what_a_resized_vocabulary_adds_is_all_that_is_kept_of_a_table_that_was_not_trained(tmp_path: Path) -> None:
    spec_of_whole = read(write(tmp_path, {}, WIDE))
    stored = load_file(tmp_path / WEIGHTS_FILE)

    def base_rows(name: str, rows: slice) -> torch.Tensor:
        return stored[f"base_model.model.{name}"][:V][rows]

    spec = read_adapter_spec(tmp_path, UNTIED, max_lora_rank=8, max_extra_vocab=3, base_rows=base_rows)
    assert spec.vocab_size == V + 3
    assert spec_of_whole.num_elements - spec.num_elements == 2 * V * H
    tables = load_adapter(spec, UNTIED, torch.float32).tables
    for module, path in (("embed_tokens", "model.embed_tokens"), ("lm_head", "lm_head")):
        assert tables[module].weight_VH is None
        ((ids, rows),) = tables[module].rows
        assert ids == (V, V + 1, V + 2)
        assert torch.equal(rows, stored[f"base_model.model.{path}.weight"][V:])
        assert rows.untyped_storage().nbytes() == spec.num_elements * 4, "the file's buffer is gone"
