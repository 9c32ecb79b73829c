"""Requests for several adapters at once: their names and weights.

Owns: the two ways to write them, the rules for composing. Leaves to others: names (routing/routing_table.py), computing
the sum (workers).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from lorafleet.controller.gateway.api.schema import GenerateFields
from lorafleet.controller.gateway.routing.routing_table import ModelEntry, RoutingTable
from lorafleet.workers.errors import AdapterRefusedError, InvalidRequestError, UnknownModelError, quoted
from lorafleet.workers.scheduling.request import MAX_COMPOSED, MAX_NAME_CHARS, check_composed_weight

MAX_MODEL_CHARS: Final = MAX_COMPOSED * (MAX_NAME_CHARS + 32)
"""Limit of `model`: `MAX_COMPOSED` names with their weights."""

_WEIGHT = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]-?[0-9]+)?")


def resolve_model(table: RoutingTable, fields: GenerateFields) -> ModelEntry:
    """Return the model for a request. Raises `UnknownModelError`, `InvalidRequestError`, `AdapterRefusedError`."""
    if fields.adapters is None:
        return resolve_name(table, fields.model)
    if fields.model and table.resolve(fields.model).digest:
        raise InvalidRequestError(
            f"model is {quoted(fields.model)}, an adapter; together with adapters it must be the base model, "
            f"{table.base_name!r}.",
            param="model",
        )
    return _compose(table, [(part.name, part.weight) for part in fields.adapters], "adapters")


def resolve_name(table: RoutingTable, name: str | None) -> ModelEntry:
    """Return a model by its name, or several as `name:weight+name:weight`, where `:weight` is optional.

    No name, or an empty one, is the base model. The name of a model is never split. Raises as `resolve_model`.
    """
    if not name:
        return table.base
    if name in table.models:
        return table.models[name]
    if len(name) > MAX_MODEL_CHARS:
        raise UnknownModelError(
            f"model has {len(name)} characters; no name, nor {MAX_COMPOSED} of them with weights, has more than "
            f"{MAX_MODEL_CHARS}. GET /v1/models lists the base model and its adapters.",
            param="model",
        )
    parts = [_part(table, part) for part in name.split("+")]
    if (len(parts) == 1 and parts[0][0] == name) or not any(part in table.models for part, _ in parts):
        return table.resolve(name)
    return _compose(table, parts, "model")


def _part(table: RoutingTable, text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition(":")
    if text in table.models or not name or not _WEIGHT.fullmatch(weight):
        return text, 1.0
    return name, float(weight)


def _compose(table: RoutingTable, parts: Sequence[tuple[str, float]], field: str) -> ModelEntry:
    """Return one entry for all. Metrics use the base model's name: callers could make up any number of others."""
    max_loras = max((worker.max_loras for worker in table.workers), default=MAX_COMPOSED)
    limit = max(1, min(MAX_COMPOSED, max_loras))
    if not 0 < len(parts) <= limit:
        raise InvalidRequestError(
            f"{field} names {len(parts)} adapters; 1 to {limit} may be applied together: {MAX_COMPOSED}, or --max-loras"
            " if that is less.",
            param=field,
        )
    names: dict[str, str] = {}  # by digest
    composition = []
    for name, weight in parts:
        try:
            entry = table.resolve(name)
        except UnknownModelError as error:
            error.param = field
            raise
        if not entry.digest:
            raise InvalidRequestError(
                f"{field} names {quoted(name)}, the base model, which every adapter is added to. Name adapters alone.",
                param=field,
            )
        if entry.digest in names:
            same = (
                ""
                if names[entry.digest] == name
                else f" (as {quoted(names[entry.digest])}, which has the same weights)"
            )
            raise InvalidRequestError(f"{field} names {quoted(name)} twice{same}. Name it once.", param=field)
        names[entry.digest] = name
        check_composed_weight(weight, f"The weight of {quoted(name)}", field)
        composition.append((entry, weight))
    if len(composition) == 1 and composition[0][1] == 1.0:
        return composition[0][0]
    for entry, _ in composition:
        if entry.not_composable:
            raise AdapterRefusedError(
                f"{quoted(entry.name)} has {entry.not_composable}; with a weight or with others only LoRA on linears "
                "is applied. Name it alone.",
                reason="not_composable",
                param=field,
            )
    texts = {entry.text_digest for entry, _ in composition}
    if len(texts) > 1:
        raise AdapterRefusedError(
            f"{' and '.join(map(quoted, names.values()))} have different tokenizers or chat templates, so they "
            "cannot be composed.",
            reason="different_texts",
            param=field,
        )
    base = table.base
    return ModelEntry(
        name=base.name,
        digest="",
        version=0,
        root=base.root,
        parent=base.name,
        created=base.created,
        text_digest=texts.pop(),
        vocab_size=table.vocab_size,
        weight=min(entry.weight for entry, _ in composition),  # so that composing gives no larger share
        composition=tuple(composition),
    )
