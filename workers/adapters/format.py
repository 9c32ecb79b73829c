"""A PEFT LoRA directory, verified and converted to what a slot can hold.

Strict: everything an adapter asks for is applied in full or refused with a reason. Leaves to others: the config's
fields (config.py), the weights file (weights_file.py), finding the directory (sources/adapters.py), keeping loaded
adapters (store.py), slots (model/lora.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import torch

from lorafleet.workers.adapters.config import CONFIG_FILE, AdapterConfig, read_config
from lorafleet.workers.adapters.digest import AdapterHash
from lorafleet.workers.adapters.folder import AdapterFolder
from lorafleet.workers.adapters.modules import EMBEDDING, FUSED, HEAD, NO_LAYER, BaseShapes, module_name
from lorafleet.workers.adapters.tensor_file import (
    DTYPES,
    KeyedTensor,
    Layout,
    TensorFile,
    in_order,
    read_again,
)
from lorafleet.workers.adapters.vocabulary import TABLES, Place, Vocabulary
from lorafleet.workers.adapters.weights_file import (
    SIDE_NAMES,
    TWIN,
    VECTORS,
    WEIGHTS_FILE,
    read_weights,
    where,
)
from lorafleet.workers.errors import AdapterRefusedError, AdapterUnavailableError, cut

_COMPARED_ROWS = 4096  # at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """A verified adapter on disk: all that is needed to load it again. Small, since thousands are kept."""

    digest: str  # identity: the tensors' bytes and the config's effect on them
    path: Path
    config: AdapterConfig
    lora_rank: int  # the highest among its modules
    num_elements: int  # of matrices: A, B, and rows of embedding and head
    num_vector_elements: int = 0  # of biases and magnitudes
    num_norm_elements: int = 0  # of norms that replace the base model's
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    files: tuple[TensorFile, ...] = ()
    source: AdapterFolder | None = field(default=None, compare=False)  # None: the path, as it is

    @property
    def folder(self) -> AdapterFolder:
        """Return where its files are and how messages name them."""
        return self.source or AdapterFolder.at(self.path)

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids valid in its requests: the base model's plus those it adds."""
        return self.vocabulary.size

    @property
    def beyond_lora(self) -> str:
        """Return what it has besides A and B of linears, for messages; empty: nothing."""
        parts = []
        if self.num_vector_elements:
            parts.append("DoRA" if self.config.use_dora else "biases")
        if self.num_norm_elements:
            parts.append("norms of its own")
        if self.vocabulary.tables:
            parts.append(f"changes of {' and '.join(self.vocabulary.tables)}")
        return ", ".join(parts)

    @property
    def not_composable(self) -> str:
        """Return why it cannot be composed with other adapters, for messages; empty: it can."""
        return self.beyond_lora or ("invocation tokens" if self.config.invocation_tokens else "")

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Return its host memory: matrices in `dtype`; vectors, and DoRA's norms of their length, in float32."""
        return self.num_elements * dtype.itemsize + self.num_vector_elements * 12 + self.num_norm_elements * 4


class LinearChange(NamedTuple):
    """An adapter's change of one linear. B is already transposed as slots store it: filling one only copies rows."""

    a_RI: torch.Tensor  # R is 0 if the adapter only replaces the bias
    b_RO: torch.Tensor
    scaling: float
    b_bias_O: torch.Tensor | None = None  # float32, like all vectors: added to (A·x)·B before scaling
    bias_O: torch.Tensor | None = None  # replaces the base model's
    magnitude_O: torch.Tensor | None = None  # DoRA's


class TableChange(NamedTuple):
    """An adapter's change of the embedding or the head."""

    weight_VH: torch.Tensor | None = None  # replaces the base model's
    rows: tuple[tuple[tuple[int, ...], torch.Tensor], ...] = ()  # then overwritten by (ids, their rows), in order
    lora: LinearChange | None = None  # added on top; the embedding's A, [R, V], is stored as [V, R]


class Form(NamedTuple):
    """Adapters of one form have only LoRA on linears and differ only in the content of their storage."""

    layout: Layout
    config: AdapterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAdapter:
    """An adapter's weights in its own host memory, by (layer, linear)."""

    digest: str
    weights: Mapping[tuple[int, str], LinearChange]
    num_bytes: int
    norm_weights: Mapping[tuple[int, str], torch.Tensor] = field(default_factory=dict)  # replace the base's
    tables: Mapping[str, TableChange] = field(default_factory=dict)  # by module; only changed ones
    vocab_size: int = 0
    # DoRA's norms of the rows of W + s·B·A. They need the base's weights, so the first slot load computes them.
    norms: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    form: Form | None = None  # None: unique

    def storage(self) -> torch.UntypedStorage | None:
        """Return the storage of all linears' A and B; None if there are none."""
        return next((change.b_RO.untyped_storage() for change in self.weights.values() if change.b_RO.numel()), None)


# (checkpoint name, rows) → those rows of the base model's tensor.
BaseRows = Callable[[str, slice], torch.Tensor]


def read_adapter_spec(
    path: Path | AdapterFolder,
    base: BaseShapes,
    *,
    max_lora_rank: int,
    max_extra_vocab: int = 0,
    base_rows: BaseRows | None = None,
) -> AdapterSpec:
    """Read and verify an adapter, weights included. Raises `AdapterRefusedError` with a reason code.

    `base_rows`: used to find tables that equal the base model's; without it none is assumed to. Takes 20 ms longer
    for a file that was just written, see `FileStamp.settle`.
    """
    folder = path if isinstance(path, AdapterFolder) else AdapterFolder.at(path)
    try:
        return _read_adapter_spec(folder, base, max_lora_rank, max_extra_vocab, base_rows)
    except AdapterRefusedError:
        raise
    except (OSError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError, RuntimeError) as error:
        # Any error a file causes in the libraries that read it is the file's fault, so the file is refused.
        logger.warning("an adapter cannot be read", exc_info=True)
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise AdapterRefusedError(
            f"{folder.shown} cannot be read as an adapter: {type(error).__name__}: {cut(what or '')}",
            reason="unreadable",
        ) from error


def _read_adapter_spec(
    folder: AdapterFolder,
    base: BaseShapes,
    max_lora_rank: int,
    max_extra_vocab: int,
    base_rows: BaseRows | None,
) -> AdapterSpec:
    path = Path(folder.shown)
    config = read_config(folder, base.module_names())
    weights = read_weights(folder, base, config, max_lora_rank, max_extra_vocab, settle=True)
    if weights.changed:
        raise _refused(path, "changed while it was read. Register it when it is complete.", "changed_while_read")
    for layer, module, side, tensor in weights.tensors:
        if not _is_finite(tensor):
            raise _refused(
                path,
                f"has NaN or infinite values in {_named(layer, module, side)}. Train or save it again.",
                "non_finite",
            )
    tables = {(module, side): tensor for layer, module, side, tensor in weights.tensors if layer == NO_LAYER}
    for first, second in weights.twins:
        if not torch.equal(tables[first], tables[second]):
            raise _refused(
                path,
                f"has two different tensors for one place: {_named(NO_LAYER, *first)} and {_named(NO_LAYER, *second)}.",
                "bad_safetensors",
            )
    vocabulary = weights.vocabulary
    for place in sorted(vocabulary.base_weights()):
        if base_rows is not None and _is_the_bases(tables[place], place, base, base_rows):
            vocabulary = vocabulary.without(place, base)
    kept = _kept(weights.tensors, vocabulary)
    spec = AdapterSpec(
        digest=_digest(kept, config, vocabulary),
        path=folder.path,
        config=config,
        lora_rank=max(tensor.shape[0] for _, _, side, tensor in kept if side == "A"),
        num_elements=sum(tensor.numel() for _, _, _, tensor in kept if tensor.dim() == 2),
        num_vector_elements=sum(tensor.numel() for _, _, side, tensor in kept if side in VECTORS),
        num_norm_elements=sum(tensor.numel() for _, module, _, tensor in kept if module in base.norms),
        vocabulary=vocabulary,
        files=weights.files,
        source=folder,
    )
    _check_activation(spec, base)
    return spec


def _check_activation(spec: AdapterSpec, base: BaseShapes) -> None:
    """Check that an activated adapter is LoRA on linears alone. PEFT, too, refuses DoRA and LoRA on the embedding."""
    tokens = spec.config.invocation_tokens
    if not tokens:
        return
    if spec.beyond_lora:
        raise _refused(
            Path(spec.folder.shown),
            f"has {spec.beyond_lora}, and {CONFIG_FILE} has alora_invocation_tokens: an activated adapter may have "
            "only LoRA on the decoder's linears.",
            "unsupported_feature",
        )
    if base.vocab_size and max(tokens) >= base.vocab_size:
        raise AdapterRefusedError(
            f"{spec.folder.shown_file(CONFIG_FILE)} has alora_invocation_tokens with the id {max(tokens)}; the base "
            f"model's ids go from 0 to {base.vocab_size - 1}.",
            reason="bad_config",
        )


def load_adapter(
    spec: AdapterSpec, base: BaseShapes, dtype: torch.dtype, files: Sequence[IO[bytes]] | None = None
) -> HostAdapter:
    """Read a verified adapter's weights into memory of its own, in `dtype`.

    files: the spec's, if already open; otherwise opened under its path. Hashes them only if their stamps do not prove
    that they are unchanged. Raises `AdapterUnavailableError` if they are gone or differ from what was verified,
    `AdapterRefusedError` if values overflow in `dtype`; the messages name no directory, see folder.py.
    """
    kept, is_all, form = _read_verified(spec, base, files)
    # What was verified is finite, so only a dtype of smaller range can make it infinite.
    wider = {other for other in DTYPES.values() if torch.finfo(other).max > torch.finfo(dtype).max}
    modules: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for (layer, module, side, stored), tensor in zip(kept, _in_dtype(kept, dtype, copy=not is_all), strict=True):
        if stored.dtype in wider and not _is_finite(tensor):
            raise _refused(
                Path(),
                f"overflows in {dtype} in {_named(layer, module, side)}. Use --lora-dtype bfloat16.",
                "non_finite",
            )
        turned = side == "B" or (side == "A" and module == EMBEDDING)
        modules.setdefault((layer, module), {})[side] = _turned_in_place(tensor) if turned else tensor
    norms = {key: sides.pop("own") for key, sides in modules.items() if key[1] in base.norms}
    sides_of = {module: modules.pop((NO_LAYER, module), {}) for module in TABLES}
    changes: dict[tuple[int, str], LinearChange] = {}
    for (layer, linear), sides in modules.items():
        if sides:
            changes |= _split(
                layer, linear, sides, scaling=spec.config.scaling(module_name(layer, linear)), base=base, dtype=dtype
            )
    return HostAdapter(
        digest=spec.digest,
        weights=changes,
        num_bytes=spec.num_bytes(dtype),
        norm_weights=norms,
        tables=_tables(sides_of, spec),
        vocab_size=spec.vocab_size,
        form=form,
    )


def _read_verified(
    spec: AdapterSpec, base: BaseShapes, files: Sequence[IO[bytes]] | None
) -> tuple[list[KeyedTensor], bool, Form | None]:
    """Return the verified tensors, whether they are all that was read, and their form."""
    with suppress(OSError), ExitStack() as opened:
        if files is None:
            files = [opened.enter_context(spec.folder.open(file.name)) for file in spec.files]
        reads = [read_again(file, known) for file, known in zip(files, spec.files, strict=True)]
        tensors = in_order(tensors for tensors, _ in reads)
        kept = _kept(tensors, spec.vocabulary)
        is_proven = all(is_proven for _, is_proven in reads)
        if is_proven or _digest(kept, spec.config, spec.vocabulary) == spec.digest:
            form = None if spec.beyond_lora else Form(spec.files[0].layout, spec.config)
            return kept, _is_all(tensors, spec), form
    # The same tensors may now be in a file with another layout.
    try:
        tensors = read_weights(spec.folder.unnamed(), base, spec.config).tensors
    except AdapterRefusedError as error:
        raise AdapterUnavailableError(f"{error.message} It was valid when it was registered.", param="model") from error
    kept = _kept(tensors, spec.vocabulary)
    if _digest(kept, spec.config, spec.vocabulary) != spec.digest:
        raise AdapterUnavailableError(
            "The adapter's files have changed since it was registered; register it again to serve the new version.",
            param="model",
        )
    return kept, _is_all(tensors, spec), None


def _is_all(tensors: Sequence[KeyedTensor], spec: AdapterSpec) -> bool:
    return spec.num_elements == sum(tensor.numel() for _, _, _, tensor in tensors if tensor.dim() == 2)


def _tables(sides_of: Mapping[str, Mapping[str, torch.Tensor]], spec: AdapterSpec) -> dict[str, TableChange]:
    changes = {}
    for module, table in spec.vocabulary.tables.items():
        lora, sides = None, sides_of[module]
        if table.lora_rank:
            # The embedding's A was transposed: a token's column is now a row.
            a_RI = sides["A"].T if module == EMBEDDING else sides["A"]
            scaling = spec.config.scaling(module_name(NO_LAYER, module))
            lora = LinearChange(
                a_RI, sides["B"], scaling, b_bias_O=sides.get("B_bias"), magnitude_O=sides.get("magnitude")
            )
        changes[module] = TableChange(
            weight_VH=None if table.weight is None else sides_of[table.weight[0]][table.weight[1]],
            rows=tuple((rows.ids, sides_of[rows.place[0]][rows.place[1]]) for rows in table.rows),
            lora=lora,
        )
    return changes


def _kept(tensors: Sequence[KeyedTensor], vocabulary: Vocabulary) -> list[KeyedTensor]:
    """Drop tensors, and table rows, that nothing uses."""
    kept = []
    for layer, module, side, tensor in tensors:
        if layer != NO_LAYER or module not in TABLES:
            kept.append((layer, module, side, tensor))
        elif (rows := vocabulary.kept((module, side))) is not None:
            kept.append((layer, module, side, tensor[rows]))
    return kept


def _is_the_bases(table_VH: torch.Tensor, place: Place, base: BaseShapes, base_rows: BaseRows) -> bool:
    """Return whether the rows of the base model's ids equal its checkpoint's."""
    name = "lm_head.weight" if place[0] == HEAD and not base.tie_embeddings else "model.embed_tokens.weight"
    for first in range(0, base.vocab_size, _COMPARED_ROWS):
        rows = slice(first, min(first + _COMPARED_ROWS, base.vocab_size))
        if not torch.equal(table_VH[rows].float(), base_rows(name, rows).float()):
            return False
    return True


def _split(
    layer: int, linear: str, sides: Mapping[str, torch.Tensor], *, scaling: float, base: BaseShapes, dtype: torch.dtype
) -> dict[tuple[int, str], LinearChange]:
    """Split a fused module's change by linear; other modules give one change."""
    shape = base.of(linear)
    assert shape is not None
    a_RI, b_RO = (
        sides[side] if side in sides else torch.empty(0, size, dtype=dtype)
        for side, size in zip("AB", shape, strict=True)
    )
    changes, begin = {}, 0
    for part in FUSED.get(linear, (linear,)):
        end = begin + base.linears[part][1]
        own = {name: sides[name][begin:end] for name in VECTORS if name in sides}
        changes[layer, part] = LinearChange(
            a_RI,
            b_RO[:, begin:end],
            scaling,
            b_bias_O=own.get("B_bias"),
            bias_O=own.get("bias"),
            magnitude_O=own.get("magnitude"),
        )
        begin = end
    return changes


def _digest(tensors: Sequence[KeyedTensor], config: AdapterConfig, vocabulary: Vocabulary) -> str:
    adapter_hash = AdapterHash()
    for layer, module, side, tensor in tensors:
        adapter_hash.add(layer, module, side, config.scaling(module_name(layer, module)), tensor)
    for module, table in sorted(vocabulary.tables.items()):
        adapter_hash.note(f"{module} {table.weight} {[(rows.place, rows.ids) for rows in table.rows]}")
    if config.invocation_tokens:
        adapter_hash.note(f"from {config.invocation_tokens}")
    return adapter_hash.hexdigest()


def _is_finite(tensor: torch.Tensor) -> bool:
    # A sum is finite only if all its terms are, and costs a twentieth of checking each; but it may overflow.
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def _in_dtype(tensors: Sequence[KeyedTensor], dtype: torch.dtype, *, copy: bool) -> list[torch.Tensor]:
    """Return the matrices themselves if all are in `dtype`, else copies in one new buffer. Vectors become float32.

    `copy`: always copy, since more was read than is kept.
    """
    matrices = [tensor for _, _, _, tensor in tensors if tensor.dim() == 2]
    if copy or any(tensor.dtype != dtype for tensor in matrices):
        sizes = [tensor.numel() for tensor in matrices]
        parts = torch.empty(sum(sizes), dtype=dtype).split(sizes)
        matrices = [part.view(tensor.shape).copy_(tensor) for part, tensor in zip(parts, matrices, strict=True)]
    rest = iter(matrices)
    # Copies: a view would keep the whole file in memory besides the new buffer.
    return [next(rest) if tensor.dim() == 2 else tensor.to(torch.float32, copy=True) for _, _, _, tensor in tensors]


def _turned_in_place(b_OR: torch.Tensor) -> torch.Tensor:
    """Transpose B to [R, O] in the same memory."""
    # As integers in numpy: it lacks bfloat16, and transposes such small matrices several times faster than torch.
    words_OR = b_OR.view(torch.int32 if b_OR.itemsize == 4 else torch.int16).numpy()
    words_OR.reshape(-1)[:] = words_OR.T.ravel()
    return b_OR.view(b_OR.shape[1], b_OR.shape[0])


def _named(layer: int, module: str, side: str) -> str:
    return f"{SIDE_NAMES[side.rstrip(TWIN)]} of {where(layer, module)}"


def _refused(path: Path, what: str, reason: str) -> AdapterRefusedError:
    return AdapterRefusedError(f"{path / WEIGHTS_FILE} {what}", reason=reason)
