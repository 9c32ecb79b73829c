"""An adapter's changes of the vocabulary's two tables: the embedding and the head.

Its files may hold all rows of a table (`modules_to_save`, or saved because the vocabulary was resized or LoRA is on the
table), rows of single ids (`trainable_token_indices`, new_embeddings.safetensors), and LoRA. This file decides from
names and shapes alone which tensors are used and for what, as PEFT does; format.py reads them.

In a base model with tied embeddings the head is the embedding. PEFT then changes both if the base's table, or single
rows of the embedding, are replaced; `modules_to_save` and LoRA change only the named table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from lorafleet.workers.adapters.config import CONFIG_FILE, AdapterConfig
from lorafleet.workers.adapters.modules import EMBEDDING, HEAD, NO_LAYER, BaseShapes, module_name
from lorafleet.workers.errors import AdapterRefusedError, cut, quoted

Place = tuple[str, str]  # of a tensor: (module, side)
TABLES = (EMBEDDING, HEAD)
NEW_EMBEDDINGS_FILE = "new_embeddings.safetensors"
_PACK = 16  # kernels/linear.py may pad a head to a multiple of this many rows

# Return the error for (problem, reason code).
Refuse = Callable[[str, str], AdapterRefusedError]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of single ids: those of a tensor from `first` on, one per id."""

    place: Place
    ids: tuple[int, ...]
    first: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """Changes of one table."""

    weight: Place | None = None  # replaces the rows of the whole vocabulary
    rows: tuple[Rows, ...] = ()  # then overwritten by these, in order
    lora_rank: int = 0  # 0: no LoRA
    is_affine: bool = False  # DoRA, or a bias in B

    @property
    def row_ids(self) -> set[int]:
        return set(chain.from_iterable(rows.ids for rows in self.rows))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The adapter's own vocabulary: ids 0 to `size`, and its changes of the tables."""

    size: int = 0
    tables: Mapping[str, Table] = field(default_factory=dict)  # only changed ones, by module
    twins: tuple[tuple[Place, Place], ...] = ()  # tensors that must be equal: one in PEFT

    def kept(self, place: Place) -> slice | None:
        """Return the used rows of a tensor; None if unused."""
        for module, table in self.tables.items():
            if place == table.weight or (place[0] == module and place[1] in ("A", "B", "B_bias", "magnitude")):
                return slice(None)
            for rows in table.rows:
                if place == rows.place:
                    return slice(rows.first, rows.first + len(rows.ids))
        return None

    def base_weights(self) -> set[Place]:
        """Return the replacing tensors that may equal the base's: PEFT also saves a table because LoRA is on it."""
        weights = {table.weight for table in self.tables.values()}
        return {weight for weight in weights if weight is not None and weight[1] == "base"}

    def without(self, weight: Place, base: BaseShapes) -> Vocabulary:
        """Return this vocabulary if the base ids' rows in `weight` equal the base's: only rows of added ids remain."""
        added = tuple(range(base.vocab_size, self.size))
        rows = (Rows(weight, added, first=base.vocab_size),) if added else ()
        tables = {
            module: replace(table, weight=None, rows=(*rows, *table.rows)) if table.weight == weight else table
            for module, table in self.tables.items()
        }
        used = {module: table for module, table in tables.items() if table != Table()}
        return replace(self, tables=used)

    def device_bytes(self, base: BaseShapes, *, itemsize: int, lora_itemsize: int, ranks: int = 1) -> int:
        """Return one rank's bytes: its share of the tables and of their LoRA, and all rows of single and added ids."""
        hidden = base.hidden_size
        num_rows = -(-base.vocab_size // ranks) + self.size - base.vocab_size
        total = 0
        for module, table in self.tables.items():
            if table.weight is not None and not (module == EMBEDDING and self.shares_weight):
                padded = -(-num_rows // _PACK) * _PACK if module == HEAD else num_rows
                total += padded * hidden * itemsize
            total += len(table.row_ids) * (hidden * itemsize + 8)
            total += table.lora_rank * (num_rows + hidden) * lora_itemsize
            if table.is_affine:
                total += 4 * (hidden if module == EMBEDDING else 2 * num_rows)
        return total

    @property
    def shares_weight(self) -> bool:
        """Return whether both tables are one tensor."""
        weights = [self.tables[module].weight if module in self.tables else None for module in TABLES]
        return weights[0] is not None and weights[0] == weights[1]


def is_saved(module: str, config: AdapterConfig, base: BaseShapes) -> bool:
    """Return whether the adapter replaces the module's whole weight."""
    tied = module == HEAD and base.tie_embeddings and config.ensure_weight_tying
    return config.saves(module_name(NO_LAYER, module)) or (tied and config.saves(module_name(NO_LAYER, EMBEDDING)))


def plan_vocabulary(
    shapes: Mapping[Place, tuple[int, ...]],
    config: AdapterConfig,
    base: BaseShapes,
    max_extra: int | None,
    refuse: Refuse,
) -> Vocabulary:
    """Derive the vocabulary from the shapes of the tables' tensors. `max_extra`: ids beyond the base's; None: any.

    The caller checks LoRA's shapes, since only then is the vocabulary's size known.
    """
    _check_matrices(shapes, base, config, refuse)
    twins: list[tuple[Place, Place]] = []
    weights = _weights(shapes, config, base, twins, refuse)
    tokens = _trained_tokens(shapes, config, base, twins, refuse)
    tables: dict[str, Table] = {}
    for module in TABLES:
        own_tokens = tokens.get(module)
        rows = [] if own_tokens is None else [own_tokens]
        new = (module, "new")
        if module == HEAD and base.tie_embeddings and new not in shapes and weights[HEAD] is None:
            new = (EMBEDDING, "new")
        if new in shapes:
            if weights[module] is not None:
                raise refuse(
                    f"has all rows of {module}, and {NEW_EMBEDDINGS_FILE} has rows of its added tokens.",
                    "overlapping_targets",
                )
            first = base.vocab_size
            rows.insert(0, Rows(new, tuple(range(first, first + shapes[new][0]))))
        has_lora = (module, "A") in shapes
        own = weights[module] is not None and weights[module][1] == "own"  # type: ignore[index]
        if (own and (has_lora or own_tokens)) or (has_lora and own_tokens and own_tokens.place[0] == module):
            raise refuse(
                f"changes {module} in two ways at once: {CONFIG_FILE} asks for more than one of LoRA, modules_to_save "
                "and trainable_token_indices on it.",
                "overlapping_targets",
            )
        tables[module] = Table(
            weight=weights[module],
            rows=tuple(rows),
            lora_rank=shapes[module, "A"][0] if has_lora and shapes[module, "A"] else 0,
            is_affine=(module, "magnitude") in shapes or (module, "B_bias") in shapes,
        )
    sizes = {module: _size(module, table, shapes, base, refuse) for module, table in tables.items()}
    size = _checked_size(sizes, base, max_extra, refuse)
    return Vocabulary(size, {module: table for module, table in tables.items() if table != Table()}, tuple(twins))


def _check_matrices(
    shapes: Mapping[Place, tuple[int, ...]], base: BaseShapes, config: AdapterConfig, refuse: Refuse
) -> None:
    for (module, side), shape in shapes.items():
        if side in ("own", "base", "tokens", "new") and (
            len(shape) != 2 or shape[1] != base.hidden_size or not shape[0]
        ):
            raise refuse(
                f"has rows of {module} of shape {quoted(list(shape))}; the base model needs [ids, {base.hidden_size}]. "
                f"{config.other_base}",
                "wrong_shape",
            )


def _weights(
    shapes: Mapping[Place, tuple[int, ...]],
    config: AdapterConfig,
    base: BaseShapes,
    twins: list[tuple[Place, Place]],
    refuse: Refuse,
) -> dict[str, Place | None]:
    """Return each table's whole weight."""

    def given(module: str, side: str) -> Place | None:
        return (module, side) if (module, side) in shapes else None

    own = {module: given(module, "own") for module in TABLES}
    replaced = {module: given(module, "base") for module in TABLES}
    if base.tie_embeddings:
        embedding, head = replaced[EMBEDDING], replaced[HEAD]
        if embedding is not None and head is not None:
            twins.append((embedding, head))
        replaced = dict.fromkeys(TABLES, embedding or head)
    embedding, head = own[EMBEDDING], own[HEAD]
    if base.tie_embeddings and config.ensure_weight_tying and embedding is not None:
        if head is not None:
            twins.append((embedding, head))
        own[HEAD] = embedding
    for module in TABLES:
        saved = is_saved(module, config, base)
        if saved and own[module] is None:
            raise refuse(
                f"lacks the weight of {module}, which {CONFIG_FILE} asks for with modules_to_save.", "config_mismatch"
            )
        if own[module] is not None and not saved:
            raise refuse(
                f"has the weight of {module}, but {CONFIG_FILE} does not ask for it with modules_to_save.",
                "config_mismatch",
            )
    return {module: own[module] or replaced[module] for module in TABLES}


def _trained_tokens(
    shapes: Mapping[Place, tuple[int, ...]],
    config: AdapterConfig,
    base: BaseShapes,
    twins: list[tuple[Place, Place]],
    refuse: Refuse,
) -> dict[str, Rows]:
    """Return each table's rows of `trainable_token_indices`."""
    ids: dict[str, tuple[int, ...]] = {}
    for end, own in config.trainable_tokens:
        modules = [module for module in TABLES if base.vocab_size and module_name(NO_LAYER, module).endswith(end)]
        if not modules:
            raise refuse(
                f"asks for trainable_token_indices on {cut(end)}; supported are {' and '.join(TABLES)}.",
                "unsupported_target",
            )
        for module in modules:
            if module in ids:
                raise refuse(f"asks twice for trainable_token_indices on {module}.", "bad_config")
            ids[module] = own
    is_tied = base.tie_embeddings and EMBEDDING in ids and ids.get(HEAD, ids[EMBEDDING]) == ids[EMBEDDING]
    rows: dict[str, Rows] = {}
    for module in TABLES:
        place = (module, "tokens")
        if module == HEAD and is_tied:
            rows[HEAD] = rows[EMBEDDING]
            if place in shapes:
                twins.append(((EMBEDDING, "tokens"), place))
            continue
        if (place in shapes) is not (module in ids):
            verb, link = ("has", "but") if place in shapes else ("lacks", "though")
            asks = "does not ask" if place in shapes else "asks"
            raise refuse(
                f"{verb} the trained tokens of {module}, {link} {CONFIG_FILE} {asks} for them with "
                "trainable_token_indices.",
                "config_mismatch",
            )
        if module in ids:
            if shapes[place][0] != len(ids[module]):
                raise refuse(
                    f"has {shapes[place][0]} trained tokens of {module}; {CONFIG_FILE} names {len(ids[module])} with "
                    "trainable_token_indices.",
                    "config_mismatch",
                )
            rows[module] = Rows(place, ids[module])
    return rows


def _size(module: str, table: Table, shapes: Mapping[Place, tuple[int, ...]], base: BaseShapes, refuse: Refuse) -> int:
    """Return the number of ids that have a row."""
    size = base.vocab_size
    if table.weight is not None:
        size = shapes[table.weight][0]
        if size < base.vocab_size:
            raise refuse(
                f"has {size} rows of {module}; the base model's vocabulary has {base.vocab_size} ids. A vocabulary may "
                "grow, not shrink: resize it to at least the base model's and train again.",
                "vocab_too_small",
            )
    for token_id in sorted(table.row_ids):
        if token_id > size or (token_id == size and table.weight is not None):
            raise refuse(
                f"has a row of {module} for the token id {token_id}, but none for {size}. Save the resized embeddings "
                "with it (save_embedding_layers=True).",
                "vocab_mismatch",
            )
        size = max(size, token_id + 1)
    return size


def _checked_size(sizes: Mapping[str, int], base: BaseShapes, max_extra: int | None, refuse: Refuse) -> int:
    size = sizes[EMBEDDING]
    if sizes[HEAD] != size:
        raise refuse(
            f"has a vocabulary of {size} ids in {EMBEDDING} and of {sizes[HEAD]} in {HEAD}. Save both tables of a "
            "resized model (save_embedding_layers=True).",
            "vocab_mismatch",
        )
    extra = size - base.vocab_size
    if max_extra is not None and extra > max_extra:
        raise refuse(
            f"adds {extra} token ids to the base model's {base.vocab_size}; the limit is {max_extra}. Start with "
            f"--lora-extra-vocab-size {extra}.",
            "vocab_too_large",
        )
    return size
