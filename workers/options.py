"""Options: the fields of a configuration that a caller may set, each declared once, where it stands.

    max_num_seqs: int = option(64, group="batching", minimum=1, maximum=65536, help="sequences in one step")

Flags of commands (controller/arguments/flags.py), their reference (controller/commands/reference.py), the keywords of
the offline engines (offline/args.py) and the checks below all derive from this. A name that ends in _s counts seconds,
in _bytes bytes. Owns: the declaration, the checks of single values. Leaves to others: checks of several values together
(the configurations), argparse.
"""

from __future__ import annotations

import dataclasses
import numbers
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from lorafleet.workers.errors import ConfigError, quoted

DAY_S: Final = 86400.0
MAX_BYTES: Final = 100 << 40
_OPTION, _NESTED = "option", "nested"
_KINDS: Final[dict[Any, tuple[type, str]]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A field's declaration, besides its name, type and default."""

    help: str
    group: str = ""  # title under which commands list it
    flag: str = ""  # if it differs from the field's name
    metavar: str = ""
    minimum: float | None = None  # numbers need this or `above`, and a maximum
    above: float | None = None  # the value must be more than this
    maximum: float | None = None
    off: float | None = None  # an additional value outside the bounds
    choices: tuple[Any, ...] = ()
    default_text: str = ""  # the meaning of a default of None or ()
    parse: Callable[[str], Any] | None = None  # text of a command line → value; raises argparse.ArgumentTypeError
    fallback: Callable[[], Any] | None = None  # value without the flag, such as an environment variable's
    is_positional: bool = False
    is_required: bool = False
    is_secret: bool = False  # never on the command line of a process that we start


def option(default: Any = dataclasses.MISSING, **said: Any) -> Any:
    """Return a dataclass field that is an option. said: fields of `Option`."""
    declared = Option(**said)
    return dataclasses.field(default=default, metadata={_OPTION: declared}, repr=not declared.is_secret)


def option_of(owner: type, name: str, **changes: Any) -> Any:
    """Return a field as another class declares it. changes: a `default` of its own, or fields of `Option`."""
    (found,) = (entry for entry in dataclasses.fields(owner) if entry.name == name)
    default = changes.pop("default", found.default)
    declared = replace(found.metadata[_OPTION], **changes)
    return dataclasses.field(default=default, metadata={_OPTION: declared}, repr=found.repr)


def nested(options: type) -> Any:
    """Return a field that holds a dataclass whose options are also its owner's."""
    return dataclasses.field(default_factory=options, metadata={_NESTED: options})


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """An option together with its field's name, type and default."""

    name: str
    kind: Any  # the type without None: int, or tuple for any tuple
    takes_none: bool
    takes_several: bool  # a tuple of any length
    default: Any  # None also if there is none
    says: Option
    path: tuple[str, ...] = ()  # of the nested fields that it lies in

    @property
    def flag(self) -> str:
        return self.says.metavar if self.says.is_positional else self.says.flag or flag_of(self.name)

    @property
    def is_size(self) -> bool:
        return self.name.endswith("_bytes")

    def bounds(self, write: Callable[[float], str] | None = None) -> str:
        """Return 'from 1 to 512', or '' if there are none. write: formats a number."""
        it, write = self.says, write or _plain
        if it.maximum is None:
            return ""
        least = f"above {write(it.above)}, at most" if it.above is not None else f"from {write(it.minimum or 0)} to"
        return f"{least} {write(it.maximum)}{'' if it.off is None else f', or {write(it.off)}'}"

    @property
    def expected(self) -> str:
        """Return the valid values, for the end of a sentence."""
        if self.says.choices:
            return f"one of {', '.join(map(str, self.says.choices))}"
        kind = "a number of bytes" if self.is_size else _KINDS.get(self.kind, (object, "another value"))[1]
        return f"{kind} {self.bounds()}".rstrip()

    def takes(self, value: Any) -> bool:
        """Return whether the declaration allows the value."""
        if value is None:
            return self.takes_none
        if self.kind in _KINDS and not _is_a(value, _KINDS[self.kind][0]):
            return False
        it = self.says
        if it.choices:
            return value in it.choices
        if self.kind not in (int, float) or (it.off is not None and value == it.off):
            return True
        assert it.maximum is not None, f"{self.name} needs bounds"
        is_enough = value > it.above if it.above is not None else value >= (it.minimum or 0)
        return bool(is_enough and value <= it.maximum)  # false for NaN


@cache
def options_of(owner: type) -> tuple[Declared, ...]:
    """Return the options of a dataclass in field order, with those of nested dataclasses in their place."""
    hints = typing.get_type_hints(owner)
    found: list[Declared] = []
    for entry in dataclasses.fields(owner):
        if inner := entry.metadata.get(_NESTED):
            found += (replace(declared, path=(entry.name, *declared.path)) for declared in options_of(inner))
        elif says := entry.metadata.get(_OPTION):
            found.append(_declared(entry, hints[entry.name], says))
    return tuple(found)


def _declared(entry: dataclasses.Field[Any], hint: Any, says: Option) -> Declared:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = typing.get_args(hint) if is_union else (hint,)
    (kind,) = (part for part in parts if part is not type(None))
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        kind, origin, says = str, None, replace(says, choices=inner)
    return Declared(
        name=entry.name,
        kind=origin or kind,
        takes_none=type(None) in parts,
        takes_several=origin is tuple and inner[-1] is Ellipsis,
        default=None if entry.default is dataclasses.MISSING else entry.default,
        says=says,
    )


def nested_in(owner: type) -> dict[str, type]:
    """Return the classes of a dataclass's nested fields."""
    return {entry.name: entry.metadata[_NESTED] for entry in dataclasses.fields(owner) if _NESTED in entry.metadata}


def check_options(config: object) -> None:
    """Check the value of each option of a configuration. Raises `ConfigError` with the flag, the value and the bounds.

    Nested configurations check their own.
    """
    owner: type = type(config)
    for declared in options_of(owner):
        if not declared.path and not declared.takes(value := getattr(config, declared.name)):
            raise ConfigError(f"{declared.flag} is {_shown(value)}; it must be {declared.expected}.")


def flag_of(field: str) -> str:
    """max_in_flight → --max-in-flight."""
    return "--" + field.replace("_", "-")


def _is_a(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else quoted(value)
