"""Options as flags: added to a parser, read from its result, and written for a process that we start.

Owns: how an option's declaration looks on a command line. Leaves to others: declarations and checks
(workers/options.py), which commands there are (commands/command_table.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from lorafleet.controller.arguments.byte_size import byte_size, size_text
from lorafleet.controller.arguments.parser import quoted
from lorafleet.workers.options import Declared, nested_in, options_of

_Options = TypeVar("_Options")


@dataclass(frozen=True, slots=True)
class Command:
    """A command of `lorafleet` and the classes whose options it takes."""

    name: str
    purpose: str
    owners: tuple[type, ...]
    description: str

    @property
    def groups(self) -> dict[str, list[Declared]]:
        """Return the options of its classes by title. If two have the same flag, the last one counts."""
        found: dict[str, Declared] = {}
        for owner in self.owners:
            for option in options_of(owner):
                found.pop(option.flag, None)
                found[option.flag] = option
        groups: dict[str, list[Declared]] = {}
        for option in found.values():
            groups.setdefault("" if option.says.is_positional else option.says.group, []).append(option)
        return groups

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Give the parser a flag for each option."""
        for title, options in self.groups.items():
            group = parser.add_argument_group(title) if title else parser
            for option in options:
                _add_flag(group, option)


def values_of(owner: type, args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments for `owner` from the given flags; options not given keep their defaults.

    Raises `ConfigError` for an invalid value of a nested class or of a fallback.
    """
    values: dict[str, Any] = {name: made(kind, args) for name, kind in nested_in(owner).items()}
    for option in options_of(owner):
        if option.path:
            continue
        value = getattr(args, option.name)
        if value is None and option.says.fallback is not None:
            value = option.says.fallback()
        if value is not None:
            values[option.name] = tuple(value) if option.takes_several else value
    return values


def made(owner: type[_Options], args: argparse.Namespace) -> _Options:
    """Return the configuration built from the given flags. Raises `ConfigError`."""
    return owner(**values_of(owner, args))


def command_line(config: Any, owner: type) -> list[str]:
    """Return the flags that give a command the options of `owner`, as `config` has them, except secret ones."""
    words: list[str] = []
    for option in options_of(owner):
        value = config
        for name in (*option.path, option.name):
            value = getattr(value, name)
        if option.says.is_secret or value is None or value == ():
            continue
        if option.kind is not bool:
            # With =, since a value may begin with -.
            values = [str(entry) for entry in value] if option.takes_several else [str(value)]
            words += [option.flag, *values] if option.takes_several else [f"{option.flag}={values[0]}"]
        elif value != option.default:
            words.append(option.flag if value else f"--no-{option.flag.removeprefix('--')}")
    return words


def default_text(option: Declared) -> str:
    """Return an option's default for help texts; empty if there is none."""
    if option.says.default_text or option.says.is_required:
        return option.says.default_text
    if option.kind is bool:
        return "on" if option.default else "off"
    if option.is_size:
        return size_text(option.default)
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)


def bounds_text(option: Declared) -> str:
    """Return an option's bounds for help texts; empty if there are none."""
    return option.bounds(lambda number: size_text(int(number))) if option.is_size else option.bounds()


def metavar(option: Declared) -> str | None:
    """Return the value's placeholder; None if the choices replace it, or if the flag takes no value."""
    if option.says.metavar or option.says.choices or option.kind is bool:
        return option.says.metavar or None
    if option.is_size:
        return "SIZE"
    return "N" if option.kind is int else "SECONDS"


def _add_flag(group: Any, option: Declared) -> None:
    it, default = option.says, default_text(option)
    said = "; ".join(text for text in (bounds_text(option), default and f"default: {default}") if text)
    # No argparse default: None means not given.
    about: dict[str, Any] = {"help": (f"{it.help} ({said})" if said else it.help).replace("%", "%%"), "default": None}
    if option.kind is bool:
        about["action"] = argparse.BooleanOptionalAction if option.default else "store_true"
    else:
        about |= {"metavar": metavar(option), "type": _reader(option), "choices": it.choices or None}
        if option.takes_several:
            about |= {"nargs": "+", "action": "extend"}
    if it.is_positional:
        group.add_argument(option.name, **about)
    else:
        group.add_argument(option.flag, dest=option.name, required=it.is_required, **about)


def _reader(option: Declared) -> Callable[[str], Any]:
    """Return the function from text to value. It raises `argparse.ArgumentTypeError` with the expected form."""
    convert = option.says.parse or (byte_size if option.is_size else str if option.takes_several else option.kind)

    def read(text: str) -> Any:
        try:
            return convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{quoted(text)} must be {option.expected}") from None

    return read
