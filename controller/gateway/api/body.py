"""Reads the JSON body of a request: its fields by their struct, and the names of those that are ignored.

Owns: JSON, which is read only here, and its errors. Leaves to others: the structs (schema.py), what becomes of a field
that is not in them (field_rule.py).

msgspec decodes strictly: true is not a number, 1.0 is not an integer, and JSON has no NaN. The number of elements in a
body is checked before it is decoded.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from lorafleet.controller.gateway.api.field_rule import FieldRule, rule_of
from lorafleet.controller.gateway.api.known_fields import INSTEAD
from lorafleet.controller.gateway.api.schema import MAX_FIELD_BYTES, SIZEABLE
from lorafleet.workers.errors import InvalidRequestError, cut, quoted
from lorafleet.workers.text.json_shape import check_shape

_MAX_DEFAULT_BYTES: Final = 256  # longer than any value that asks for nothing

_T = TypeVar("_T", bound=msgspec.Struct)
_WHERE = re.compile(r" - at `\$(?:\.([A-Za-z_0-9]+))?(.*)`$")


@dataclass(frozen=True, slots=True)
class Body(Generic[_T]):
    """A request's body. ignored: names of fields that are not honoured, as the client wrote them."""

    fields: _T
    ignored: list[str]


def decode(body: bytes, kind: type[_T], *, strict: bool = False) -> Body[_T]:
    """Decode a request's body. strict: refuses what is ignored otherwise. Raises InvalidRequestError that names the
    field."""
    _check_shape(body, kind)
    given = _decode(body, dict[str, msgspec.Raw])
    rule = rule_of(kind)
    ignored = list(_ignored(given, rule, strict=strict))
    fields: _T = _decode(body, kind)
    for name in given.keys() & rule.other_names.keys():
        _read_other_name(fields, name, rule.other_names[name], bytes(given[name]))
    return Body(fields, ignored)


def decode_field(raw: bytes, kind: Any, name: str) -> Any:
    """Decode the value of one field, or of a part of it. Raises InvalidRequestError that names the field."""
    return _decode(raw, kind, name)


def _ignored(given: dict[str, msgspec.Raw], rule: FieldRule, outer: str = "", *, strict: bool) -> Iterator[str]:
    """Yield the names of fields that are ignored, as `outer.inner` within another field.

    Raises InvalidRequestError for one that is refused, or too large.
    """
    for name, raw in given.items():
        num_bytes = memoryview(raw).nbytes
        if name in rule.honoured or name in rule.other_names:
            if num_bytes > MAX_FIELD_BYTES and name not in SIZEABLE and not outer:
                raise InvalidRequestError(f"{name} has {num_bytes} bytes; the limit is {MAX_FIELD_BYTES}.", param=name)
            if name in rule.inner and bytes(raw)[:1] == b"{":
                parts = _decode(bytes(raw), dict[str, msgspec.Raw])
                yield from _ignored(parts, rule_of(rule.inner[name]), f"{outer}{name}.", strict=strict)
            continue
        if num_bytes <= _MAX_DEFAULT_BYTES and rule.asks_nothing(name, _decode(bytes(raw), object)):
            continue
        path, param = outer + name, outer.partition(".")[0] or cut(name)
        if rule.is_refused(name) or (strict and name in rule.known):
            instead = INSTEAD.get(name, "Leave it out.")
            raise InvalidRequestError(f"{quoted(path)} is not supported by this server. {instead}", param=param)
        if strict and not rule.is_accepted_by_strict(name):
            raise InvalidRequestError(f"{quoted(path)} is not a known field. Leave it out.", param=param)
        yield path


def _read_other_name(fields: msgspec.Struct, name: str, own: str, raw: bytes) -> None:
    """Read a field that is given under another server's name, which may repeat ours but not contradict it."""
    (declared,) = (field for field in msgspec.structs.fields(fields) if field.name == own)
    value = _decode(raw, declared.type | None, name)
    if value is None:
        return
    current = getattr(fields, own)
    if current not in (None, declared.default, value):
        raise InvalidRequestError(
            f"{name} is {quoted(value)} and {own}, which means the same, is {quoted(current)}. Give one of them.",
            param=name,
        )
    setattr(fields, own, value)


def _check_shape(body: bytes, kind: type[msgspec.Struct]) -> None:
    try:
        check_shape(body, "The body")
    except InvalidRequestError as error:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            parts = msgspec.json.decode(body, type=_parts_of(kind))  # leaves the fields undecoded
            for name in kind.__struct_fields__:
                check_shape(bytes(getattr(parts, name)), name, param=name)
        raise error


@functools.cache
def _parts_of(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """Return `kind` with all of its fields left as raw JSON."""
    return msgspec.defstruct(
        f"{kind.__name__}Parts", [(name, msgspec.Raw, msgspec.Raw(b"")) for name in kind.__struct_fields__]
    )


def _decode(body: bytes, kind: Any, name: str | None = None) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), name) from None
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not UTF-8: {error.reason} at byte {error.start}.") from None
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None


def _explain(problem: str, root: str | None) -> InvalidRequestError:
    """Return msgspec's message in our words. It contains only types, places and unknown names of the body."""
    where = _WHERE.search(problem)
    detail = problem[: where.start()] if where else problem
    detail = cut(detail.replace(" | null", "")).rstrip(".")
    name = where.group(1) if where else None
    place = where.group(2) if where else ""
    if root is not None:
        return InvalidRequestError(f"{root}{place}: {detail[0].lower()}{detail[1:]}.", param=root.partition("[")[0])
    if name is not None:
        return InvalidRequestError(f"{name}{place}: {detail[0].lower()}{detail[1:]}.", param=name)
    missing = re.match(r"Object missing required field `(\w+)`", detail)
    if missing:
        return InvalidRequestError(f"{missing.group(1)!r} is required.", param=missing.group(1))
    return InvalidRequestError(f"The body does not fit: {detail[0].lower()}{detail[1:]}.")
