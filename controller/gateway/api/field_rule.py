"""What becomes of a field of a request: it is honoured, refused by name, or ignored.

A field that would change the answer is refused if it is not honoured; any other one is ignored. Owns: the rule of each
endpoint. Leaves to others: the fields (schema.py, known_fields.py), applying the rule to a body (body.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, get_args

import msgspec

from lorafleet.controller.gateway.api.known_fields import (
    HARMLESS,
    HARMLESS_VALUES,
    OF_ADAPTERS,
    OF_CHAT,
    OF_COMPLETIONS,
    OF_DETOKENIZE,
    OF_GENERATION,
    OF_STREAM_OPTIONS,
    OTHER_NAMES,
    Values,
)
from lorafleet.controller.gateway.api.schema import (
    ASKS_NOTHING,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterBody,
    StreamOptions,
    TokenizeRequest,
    UnloadAdapterBody,
)

_EMPTY: Final[Values] = (False, 0, "", [], {})
"""What asks for nothing in a field that only another endpoint has."""

ENDPOINTS: Final[Mapping[str, type[msgspec.Struct]]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/load_lora_adapter": LoadAdapterBody,
    "/v1/unload_lora_adapter": UnloadAdapterBody,
}


@dataclass(frozen=True, slots=True)
class FieldRule:
    """The rule for the fields of one kind of object."""

    honoured: frozenset[str]
    inner: Mapping[str, type[msgspec.Struct]]  # honoured fields that are objects with a rule of their own
    other_names: Mapping[str, str]  # of honoured fields
    known: Mapping[str, Values]  # not honoured → the values that ask for nothing

    @property
    def names(self) -> set[str]:
        """Return all fields of which it is known what they mean."""
        return {*self.honoured, *self.other_names, *self.known}

    def is_refused(self, name: str) -> bool:
        """Return whether the field would change the answer and is not honoured."""
        return name in self.known and name not in HARMLESS

    def asks_nothing(self, name: str, value: object) -> bool:
        """Return whether a value of a field that is not honoured is the same as leaving it out."""
        return value is None or any(
            value == default and isinstance(value, bool) == isinstance(default, bool)
            for default in self.known.get(name, ())
        )

    def is_accepted_by_strict(self, name: str) -> bool:
        """Return whether even `--strict-fields` lets any value of the field pass."""
        return name in ASKS_NOTHING


@functools.cache
def rule_of(kind: type[msgspec.Struct]) -> FieldRule:
    """Return the rule for an endpoint's body, or for an object in it."""
    honoured = frozenset(kind.__struct_encode_fields__)
    inner = {
        field.encode_name: part
        for field in msgspec.structs.fields(kind)
        for part in (field.type, *get_args(field.type))
        if isinstance(part, type) and issubclass(part, msgspec.Struct)
    }
    known = {name: values for name, values in _known(kind).items() if name not in honoured}
    other_names = {
        name: own for name, own in OTHER_NAMES.items() if own in honoured and name not in honoured and name not in known
    }
    return FieldRule(honoured, inner, other_names, known)


def _known(kind: type[msgspec.Struct]) -> dict[str, Values]:
    if kind in (ChatRequest, CompletionRequest):
        of_either = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
        return dict.fromkeys(of_either, _EMPTY) | HARMLESS_VALUES | OF_CHAT | OF_COMPLETIONS | OF_GENERATION
    if kind is TokenizeRequest:
        return dict(OF_CHAT)
    if kind is DetokenizeRequest:
        return dict(OF_DETOKENIZE)
    if kind is StreamOptions:
        return dict(OF_STREAM_OPTIONS)
    if kind in (LoadAdapterBody, UnloadAdapterBody):
        return dict(OF_ADAPTERS)
    return {}
