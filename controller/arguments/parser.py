"""Command lines whose mistakes are answered with the command's own usage and the nearest existing flag or command."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

_MAX_QUOTED = 200  # characters of a value in a message


class CommandParser(argparse.ArgumentParser):
    """Refuses unknown flags itself; argparse leaves them to the program, whose usage lists no flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Leave nothing over. Unknown flags are reported first: a mistyped one is often why another is missing."""
        for flag in self._flags_of(args or ()):
            if flag not in self._option_string_actions:
                self.error(self._unknown(flag))
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"{quoted(unknown[0])} is one value too many.")
        return known, []

    def command(self, name: str) -> CommandParser:
        """Return the parser of one of its commands; the parser itself if it has no such command."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and name in action.choices:
                parser: CommandParser = action.choices[name]
                return parser
        return self

    def _flags_of(self, args: Sequence[str]) -> Iterable[str]:
        """Return what argparse takes for long flags: up to a command, which has flags of its own, or to --."""
        has_commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        for text in args:
            if text == "--" or (has_commands and not text.startswith("-")):
                return
            if text.startswith("--") and " " not in text.partition("=")[0]:
                yield text.partition("=")[0]

    def _unknown(self, flag: str) -> str:
        bare = flag.lstrip("-").upper()
        if any(action.metavar == bare for action in self._actions if not action.option_strings):
            return f"There is no flag {flag}: give {bare} without one."
        flags = [name for action in self._actions for name in action.option_strings]
        hint = _nearest(flag, flags) or f" `{self.prog} --help` lists them."
        return f"There is no flag {quoted(flag)}.{hint}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        message = f"{quoted(str(value))} is none of {', '.join(names)}.{_nearest(str(value), names)}"
        raise argparse.ArgumentError(action, message)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            if len(arg_string) > _MAX_QUOTED:
                error.message = error.message.replace(arg_string, f"{arg_string[:_MAX_QUOTED]}...")
            raise


def quoted(text: str) -> str:
    """Return a value as messages quote it, cut to `_MAX_QUOTED` characters."""
    return repr(text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}...")


def _nearest(text: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(text[:_MAX_QUOTED], list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""
