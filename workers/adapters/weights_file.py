"""A PEFT adapter's adapter_model.safetensors: header checked against base model and config, tensors read.

The tensors' names say which modules an adapter changes. Anything that cannot be applied is refused with a reason. A
second file, new_embeddings.safetensors, may hold the rows of added tokens, a convention of S-LoRA and vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.workers.adapters.config import CONFIG_FILE, AdapterConfig
from lorafleet.workers.adapters.folder import AdapterFolder
from lorafleet.workers.adapters.foreign import missing_weights
from lorafleet.workers.adapters.modules import (
    EMBEDDING,
    FINAL_NORM,
    FUSED,
    HEAD,
    NO_LAYER,
    PARENTS,
    BaseShapes,
    module_name,
)
from lorafleet.workers.adapters.tensor_file import FirstRead, Key, KeyedTensor, TensorFile, in_order, read_file, refused
from lorafleet.workers.adapters.vocabulary import (
    NEW_EMBEDDINGS_FILE,
    TABLES,
    Place,
    Vocabulary,
    is_saved,
    plan_vocabulary,
)
from lorafleet.workers.errors import AdapterRefusedError, cut, quoted

WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = r"(?:base_model\.model\.)?"
# In canonical form: "007" is no layer, and numbers of thousands of digits are not parsed.
_LAYER = r"(?P<layer>0|[1-9][0-9]{0,5})"
_LORA = (
    r"(?P<A>lora_A(?:\.[^.]+)?\.weight)|(?P<B>lora_B(?:\.[^.]+)?\.weight)|(?P<B_bias>lora_B(?:\.[^.]+)?\.bias)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)"
)
_LINEAR = re.compile(
    rf"{_PREFIX}model\.layers\.{_LAYER}\.(?P<parent>self_attn|mlp)\.(?P<linear>\w+)\."
    rf"(?:{_LORA}|(?P<bias>(?:base_layer\.)?bias))"
)
# A whole weight has other names if PEFT saves the table because the vocabulary was resized or LoRA is on it.
_WHOLE = (
    r"(?P<tokens>token_adapter\.trainable_tokens_delta(?:\.[^.]+)?)|(?P<own>modules_to_save(?:\.[^.]+)?\.weight)"
    r"|(?P<base>(?:base_layer|original_module|token_adapter\.base_layer)\.weight)|(?P<weight>weight)"
)
_EMBEDDING = re.compile(
    rf"{_PREFIX}model\.embed_tokens\.(?:(?P<A>lora_embedding_A(?:\.[^.]+)?)|(?P<B>lora_embedding_B(?:\.[^.]+)?)"
    rf"|(?P<magnitude>lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)|{_WHOLE})"
)
_HEAD = re.compile(rf"{_PREFIX}lm_head\.(?:{_LORA}|{_WHOLE})")
_NORM = re.compile(rf"{_PREFIX}model\.(?:layers\.{_LAYER}\.(?P<name>(?:self_attn\.)?\w+)|norm)\.weight")
_MAX_NAME_CHARS = 1000
# Prefixes of names: a language model inside a multimodal one (two variants), and Tinker's name of the head.
_WRAPPED = {
    "base_model.model.model.language_model.": "base_model.model.model.",
    "base_model.model.language_model.": "base_model.model.",
    "base_model.model.model.unembed_tokens.": "base_model.model.lm_head.",
}
_NEW_EMBEDDINGS = {"input_embeddings": EMBEDDING, "output_embeddings": HEAD}
VECTORS = ("B_bias", "bias", "magnitude")  # one value per output
_SIDES = ("A", "B", *VECTORS)
SIDE_NAMES = {
    "A": "lora_A",
    "B": "lora_B",
    "B_bias": "the bias of lora_B",
    "bias": "the bias",
    "magnitude": "lora_magnitude_vector",
    "own": "the weight",
    "base": "the base weight",
    "tokens": "the trained tokens",
    "new": "the added tokens",
}
TWIN = "'"  # suffix of the side of a tensor that has two names


def where(layer: int, module: str) -> str:
    """Return a module's place, for messages."""
    return module if layer == NO_LAYER else f"layer {layer} {module}"


@dataclass(frozen=True, slots=True)
class Weights:
    """The result of one read of the weights."""

    tensors: list[KeyedTensor]  # in canonical order
    vocabulary: Vocabulary
    twins: tuple[tuple[Place, Place], ...]  # tensors of the tables that must be equal
    files: tuple[TensorFile, ...]
    changed: bool  # while it was read


def read_weights(
    folder: AdapterFolder,
    base: BaseShapes,
    config: AdapterConfig,
    max_lora_rank: int | None = None,
    max_extra_vocab: int | None = None,
    *,
    settle: bool = False,
) -> Weights:
    """Read each file once, into one buffer; the tensors are views of it.

    Names, shapes, ranks and dtypes are checked first. `settle`: make the stamps proof of what is read.
    """
    weights_path = folder.shown_file(WEIGHTS_FILE)
    names = folder.names()
    if WEIGHTS_FILE not in names:
        what, reason = missing_weights(names, folder.path)
        raise AdapterRefusedError(f"{folder} {what}", reason=reason)
    new_files = [name for name in names if name.startswith("new_embeddings")]
    reads = (
        [_read_new_embeddings(folder, new_files, base, config, max_extra=max_extra_vocab, settle=settle)]
        if new_files
        else []
    )
    new = {(module, side): tuple(tensor.shape) for read in reads for _, module, side, tensor in read.tensors}
    _check_saved(folder.shown_file(CONFIG_FILE), config, base)
    plan: list[tuple[Vocabulary, tuple[tuple[Place, Place], ...]]] = []

    def keys_of(header: Any) -> dict[str, Key]:
        keys, own, twins = _check_header(
            weights_path, header, base, config, max_lora_rank=max_lora_rank, max_extra_vocab=max_extra_vocab, new=new
        )
        plan.append((own, twins))
        return keys

    reads.append(read_file(folder, WEIGHTS_FILE, keys_of, settle))
    ((vocabulary, twins),) = plan
    return Weights(
        tensors=in_order(read.tensors for read in reads),
        vocabulary=vocabulary,
        twins=twins,
        files=tuple(read.file for read in reads),
        changed=any(read.changed for read in reads),
    )


def _read_new_embeddings(
    folder: AdapterFolder,
    files: Sequence[str],
    base: BaseShapes,
    config: AdapterConfig,
    *,
    max_extra: int | None,
    settle: bool,
) -> FirstRead:
    """Read the rows of tokens added to the base's vocabulary. max_extra: their maximum number; None: any."""
    for name in files:
        if name.endswith((".bin", ".pt", ".pth")):
            raise _pickle(folder.shown_file(name))
        if name != NEW_EMBEDDINGS_FILE or not base.vocab_size:
            raise folder.refused(
                name, f"is not supported; added tokens must be in {NEW_EMBEDDINGS_FILE}.", "unsupported_feature"
            )
    path = folder.shown_file(NEW_EMBEDDINGS_FILE)

    def keys(header: Any) -> dict[str, Key]:
        names = header.offset_keys()
        for name in names:
            if name not in _NEW_EMBEDDINGS:
                raise refused(
                    path,
                    f"has the tensor {cut(name)}; supported are {' and '.join(_NEW_EMBEDDINGS)}.",
                    "unsupported_target",
                )
            shape = list(header.get_slice(name).get_shape())
            if len(shape) != 2 or shape[1] != base.hidden_size or not shape[0]:
                what = f"{name}, rows of {_NEW_EMBEDDINGS[name]},"
                raise _wrong_shape(path, what, shape, f"[ids, {base.hidden_size}]", config)
            if max_extra is not None and shape[0] > max_extra:
                raise refused(
                    path,
                    f"adds {shape[0]} token ids; the limit is {max_extra}. Start with --lora-extra-vocab-size "
                    f"{shape[0]}.",
                    "vocab_too_large",
                )
        return {name: (NO_LAYER, _NEW_EMBEDDINGS[name], "new") for name in names}

    return read_file(folder, NEW_EMBEDDINGS_FILE, keys, settle)


def _check_header(
    weights_path: Path,
    header: Any,
    base: BaseShapes,
    config: AdapterConfig,
    *,
    max_lora_rank: int | None,
    max_extra_vocab: int | None,
    new: Mapping[Place, tuple[int, ...]],
) -> tuple[dict[str, Key], Vocabulary, tuple[tuple[Place, Place], ...]]:
    """Return each name's key, the vocabulary and the twins. `new`: shapes of added tokens' rows."""
    names = sorted(header.offset_keys())
    shapes = {name: list(header.get_slice(name).get_shape()) for name in names}
    empty = next((name for name in names if shapes[name] == [0]), None)
    if empty is not None:
        raise refused(
            weights_path,
            f"has empty tensors ({cut(empty)} has no elements). DeepSpeed ZeRO-3 and FSDP write these if the weights "
            "are not gathered: gather them before save_pretrained(), and save again.",
            "empty_tensors",
        )
    keys, twins = _keys(weights_path, names, base, config)
    for layer, module, side in keys.values():
        lora_rank = config.rank(module_name(layer, module))
        if side in _SIDES and max_lora_rank is not None and lora_rank > max_lora_rank:
            raise refused(
                weights_path.with_name(CONFIG_FILE),
                f"has rank {lora_rank}; the limit is {max_lora_rank} ({module_name(layer, module)}). Start with "
                f"--max-lora-rank {lora_rank}.",
                "rank_too_large",
            )
    tables = {
        (module, side): tuple(shapes[name])
        for name, (layer, module, side) in keys.items()
        if layer == NO_LAYER and module in TABLES and not side.endswith(TWIN)
    }
    vocabulary = plan_vocabulary(
        {**tables, **new}, config, base, max_extra_vocab, lambda what, reason: refused(weights_path, what, reason)
    )
    in_and_out = {EMBEDDING: (vocabulary.size, base.hidden_size), HEAD: (base.hidden_size, vocabulary.size)}
    for name, (layer, module, side) in keys.items():
        if side in _SIDES:
            shape = in_and_out[module] if layer == NO_LAYER else base.of(module)
            assert shape is not None
            _check_shape(
                weights_path,
                name,
                side,
                shapes[name],
                base=shape,
                lora_rank=config.rank(module_name(layer, module)),
                config=config,
            )
        elif module in base.norms:
            _check_shape(
                weights_path, name, side, shapes[name], base=(0, base.norms[module]), lora_rank=0, config=config
            )
    return keys, vocabulary, (*twins, *vocabulary.twins)


def _keys(
    weights_path: Path, names: Sequence[str], base: BaseShapes, config: AdapterConfig
) -> tuple[dict[str, Key], tuple[tuple[Place, Place], ...]]:
    """Return each name's key, in canonical order, and the pairs of names that are one tensor.

    Each must belong to a module that the base model has, and agree with the config.
    """
    found: dict[Key, str] = {}
    twins: list[tuple[Place, Place]] = []
    plain: set[str] = set()  # tables with a weight under the base model's name
    for name in names:
        layer, module, side = _key(weights_path, name, base, config)
        if layer >= base.num_layers:
            raise refused(
                weights_path,
                f"has {cut(name)}; the base model has {base.num_layers} layers. {config.other_base}",
                "unknown_layer",
            )
        if side == "weight":
            plain.add(module)
            side = "own" if is_saved(module, config, base) else "base"
        if (layer, module, side) in found and module in TABLES and side in ("own", "base"):
            first = (module, side)
            while (layer, module, side) in found:
                side += TWIN
            twins.append((first, (module, side)))
        key = (layer, module, side)
        if key in found:
            raise refused(
                weights_path, f"has two tensors for one place: {cut(found[key])} and {cut(name)}.", "bad_safetensors"
            )
        found[key] = name
    if not any(side == "A" for _, _, side in found):
        raise refused(weights_path, "holds no LoRA weights.", "no_weights")
    for layer, module in dict.fromkeys((layer, module) for layer, module, _ in found):
        sides = {side for side in _SIDES if (layer, module, side) in found}
        _check_module(weights_path, layer, module, sides, config)
        if "A" in sides and module in plain:
            raise refused(weights_path, f"has LoRA on {module} and its weight.", "overlapping_targets")
        for part in FUSED.get(module, ()):
            if any((layer, part, side) in found for side in _SIDES):
                raise refused(
                    weights_path,
                    f"has LoRA on {module} and on {part} of layer {layer}, which is part of it.",
                    "overlapping_targets",
                )
    for layer, module in base.norm_places():
        if ((layer, module, "own") in found) is not config.saves(module_name(layer, module)):
            verb, asks = ("has", "does not ask") if (layer, module, "own") in found else ("lacks", "asks")
            raise refused(
                weights_path,
                f"{verb} the weight of {module_name(layer, module)}, {'but' if verb == 'has' else 'though'} "
                f"{CONFIG_FILE} {asks} for it with modules_to_save.",
                "config_mismatch",
            )
    return {name: key for key, name in sorted(found.items())}, tuple(twins)


def _key(weights_path: Path, given: str, base: BaseShapes, config: AdapterConfig) -> Key:
    """Return a name's (layer, module, side); the side is "weight" if only the config can tell whose it is."""
    # Patterns refer to module names at training time, so renamed modules must not depend on any pattern.
    name = given if config.ranks or config.alphas or len(given) > _MAX_NAME_CHARS else _without_wrappers(given)
    match = _LINEAR.fullmatch(name)
    if match is not None and PARENTS.get(match["linear"]) == match["parent"] and base.of(match["linear"]) is not None:
        return int(match["layer"]), match["linear"], str(match.lastgroup)
    for module, pattern in ((EMBEDDING, _EMBEDDING), (HEAD, _HEAD)):
        match = pattern.fullmatch(name)
        if match is not None and base.vocab_size:
            return NO_LAYER, module, str(match.lastgroup)
    match = _NORM.fullmatch(name)
    if match is not None:
        norm = FINAL_NORM if match["name"] is None else match["name"].rpartition(".")[2]
        layer = NO_LAYER if match["layer"] is None else int(match["layer"])
        is_known = norm in base.norms and (norm == FINAL_NORM) is (layer == NO_LAYER)
        if is_known and name.endswith(f"{module_name(layer, norm)}.weight"):
            return layer, norm, "own"
    raise refused(
        weights_path,
        f"has the tensor {cut(given)}; supported are LoRA on {', '.join(base.linears)}, {' and '.join(TABLES)}, and "
        f"whole weights of {', '.join(TABLES)} and norms.",
        "unsupported_target",
    )


def _without_wrappers(name: str) -> str:
    """Return a tensor's name without the prefixes of torch.compile and of an enclosing model."""
    name = name.replace("_orig_mod.", "")  # torch.compile
    for wrapped, plain in _WRAPPED.items():
        if name.startswith(wrapped):
            return plain + name[len(wrapped) :]
    return name


def _check_saved(config_path: Path, config: AdapterConfig, base: BaseShapes) -> None:
    """Check that `modules_to_save` names only modules that can be replaced."""
    served = [module_name(layer, norm) for layer, norm in base.norm_places()]
    served += [module_name(NO_LAYER, table) for table in TABLES if base.vocab_size]
    linears = [module_name(layer, linear) for layer in range(base.num_layers) for linear in base.linears]
    for end in config.modules_to_save:
        other = next((linear for linear in linears if linear.endswith(end)), None)
        if other is not None or not any(module.endswith(end) for module in served):
            raise refused(
                config_path,
                f"asks for modules_to_save={quoted(end)}; supported are {', '.join(TABLES)} and the model's norms.",
                "unsupported_target",
            )


def _check_module(weights_path: Path, layer: int, module: str, sides: set[str], config: AdapterConfig) -> None:
    """Check that a module has exactly the LoRA tensors that the config asks for."""
    place = where(layer, module)
    for side, other in (("A", "B"), ("B", "A")):
        if side in sides and other not in sides:
            raise refused(weights_path, f"has lora_{side} of {place} without lora_{other}.", "missing_pair")
    for side, option, is_asked in (
        ("magnitude", "use_dora", config.use_dora and "A" in sides),
        ("B_bias", "lora_bias", config.lora_bias and "A" in sides),
        ("bias", "bias", config.trains_bias),
    ):
        if side in sides and not is_asked:
            raise refused(
                weights_path,
                f"has {SIDE_NAMES[side]} of {place}, but {CONFIG_FILE} does not ask for it with {option}.",
                "config_mismatch",
            )
        # Only modules with a bias in the base model have a bias of their own.
        if is_asked and side not in sides and side != "bias":
            raise refused(
                weights_path,
                f"lacks {SIDE_NAMES[side]} of {place}, which {CONFIG_FILE} asks for with {option}.",
                "config_mismatch",
            )


def _check_shape(
    weights_path: Path,
    name: str,
    side: str,
    shape: list[int],
    *,
    base: tuple[int, int],
    lora_rank: int,
    config: AdapterConfig,
) -> None:
    num_in, num_out = base
    expected = {"A": [lora_rank, num_in], "B": [num_out, lora_rank]}.get(side, [num_out])
    if shape == expected:
        return
    if len(shape) == len(expected) == 2 and shape[1 if side == "A" else 0] == expected[1 if side == "A" else 0]:
        raise refused(
            weights_path,
            f"has {cut(name)} of shape {quoted(shape)}; {CONFIG_FILE} says r={lora_rank}: {expected}.",
            "rank_mismatch",
        )
    raise _wrong_shape(weights_path, name, shape, str(expected), config)


def _wrong_shape(
    weights_path: Path, name: str, shape: list[int], expected: str, config: AdapterConfig
) -> AdapterRefusedError:
    return refused(
        weights_path,
        f"has {cut(name)} of shape {quoted(shape)}; the base model needs {expected}. {config.other_base}",
        "wrong_shape",
    )


def _pickle(path: Path) -> AdapterRefusedError:
    return refused(
        path, "is a pickle, which is never read because it can run code. Save the adapter with safetensors.", "pickle"
    )
