"""JSON schemas of the kinds that callers send, by category, with documents that end soon."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

NAMES = ("id", "name", "age", "tags", "city", "price", "kind", "note")


def _string(draw: random.Random) -> Schema:
    low = draw.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + draw.randint(0, 6)}


def _enum(draw: random.Random) -> Schema:
    values: list[Any] = ["red", "green", "x y", 1, 2.5, None, True, {"a": [1]}, 'quo"te', "back\\slash"]
    return {"enum": draw.sample(values, draw.randint(1, 5))}


def _const(draw: random.Random) -> Schema:
    return {"const": draw.choice(["yes", 7, None, False, [1, "a"], {"k": {"l": []}}])}


def _integer(draw: random.Random) -> Schema:
    low = draw.randint(-500, 500)
    return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 2000)}


def _open_integer(draw: random.Random) -> Schema:
    bound = draw.choice(["exclusiveMinimum", "exclusiveMaximum"])
    return {"type": "integer", bound: draw.randint(-20, 20), "minimum": -999, "maximum": 999}


def _number(draw: random.Random) -> Schema:
    low = round(draw.uniform(-10, 10), 2)
    return {"type": "number", "minimum": low, "maximum": round(low + draw.uniform(0.5, 50), 2)}


def _multiple(draw: random.Random) -> Schema:
    return {"type": "integer", "multipleOf": draw.choice([2, 5, 7]), "minimum": 0, "maximum": 500}


def _pattern(draw: random.Random) -> Schema:
    patterns = ["^[A-Z]{2}[0-9]{3}$", "^(foo|bar)-[a-f0-9]{4}$", "^a+b?$", r"^\d{1,3}(\.\d{1,3}){3}$"]
    return {"type": "string", "pattern": draw.choice(patterns), "maxLength": 20}


def _format(draw: random.Random) -> Schema:
    return {"type": "string", "format": draw.choice(["date", "uuid", "ipv4"])}


def _nullable(draw: random.Random) -> Schema:
    return {"type": ["boolean", "null"]}


def _any_of(draw: random.Random) -> Schema:
    return {"anyOf": [_string(draw), _integer(draw), {"type": "null"}]}


def _tagged(draw: random.Random) -> Schema:
    """Return a union as pydantic writes it."""

    def part(tag: str, value: Schema) -> Schema:
        return _object({"kind": {"const": tag}, "value": value})

    return {"oneOf": [part("cat", _integer(draw)), part("dog", _string(draw))]}


def _all_of(draw: random.Random) -> Schema:
    parts = [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": draw.randint(3, 90)}]
    return {"allOf": parts}


def _array(draw: random.Random) -> Schema:
    low = draw.randint(0, 2)
    items = draw.choice([_string, _integer, _enum])(draw)
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + draw.randint(0, 3)}


def _tuple(draw: random.Random) -> Schema:
    return {"type": "array", "prefixItems": [_integer(draw), _enum(draw)], "items": False, "minItems": 2}


def _object(properties: Schema, *, optional: tuple[str, ...] = ()) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _flat(draw: random.Random) -> Schema:
    names = draw.sample(NAMES, draw.randint(1, 4))
    kinds = [_string, _enum, _integer, _number, _nullable, _const]
    return _object({name: draw.choice(kinds)(draw) for name in names}, optional=tuple(names[1:]))


def _nested(draw: random.Random) -> Schema:
    return _object({"outer": _object({"inner": _flat(draw), "list": _array(draw)})})


def _map(draw: random.Random) -> Schema:
    value = _integer(draw)
    return {
        "type": "object",
        "patternProperties": {"^[a-c]{1,2}$": value},
        "additionalProperties": False,
        "maxProperties": 2,
    }


def _references(draw: random.Random) -> Schema:
    defs = {"point": _object({"x": _integer(draw), "y": _integer(draw)})}
    point = {"$ref": "#/$defs/point"}
    return {"$defs": defs, **_object({"from": point, "to": point})}


def _recursive(draw: random.Random) -> Schema:
    kids = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}
    node = _object({"value": {"enum": [1, 2]}, "kids": kids}, optional=("kids",))
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


CATEGORIES: dict[str, Callable[[random.Random], Schema]] = {
    "string": _string,
    "enum": _enum,
    "const": _const,
    "integer": _integer,
    "open integer": _open_integer,
    "number": _number,
    "multiple": _multiple,
    "pattern": _pattern,
    "format": _format,
    "nullable": _nullable,
    "anyOf": _any_of,
    "tagged union": _tagged,
    "allOf": _all_of,
    "array": _array,
    "tuple": _tuple,
    "flat object": _flat,
    "nested object": _nested,
    "map": _map,
    "references": _references,
    "recursive": _recursive,
}


def schema_of(category: str, number: int) -> Schema:
    """Return one of the category's schemas, the same for the same number."""
    return CATEGORIES[category](random.Random(f"{category}:{number}"))
