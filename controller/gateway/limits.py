"""Bounds on what clients may make a gateway hold, as an operator gives them: defaults, flags, checks.

Owns: that each is declared once. Leaves to others: keeping to them (connections.py, api/intake.py, streams/inbox.py).
`lorafleet serve`, `up` and `gateway` all have these flags, so this imports nothing that takes long.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, Self

from lorafleet.controller.arguments.byte_size import byte_size
from lorafleet.workers.errors import ConfigError


class _TakesFlags(Protocol):  # a parser, or a group of one
    def add_argument(self, *names: str, **options: Any) -> argparse.Action: ...


def _bound(default: int, help_text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, "metavar": "N"} | metadata)


def _size(default: int, help_text: str) -> Any:
    return _bound(default, help_text, type=byte_size, metavar="SIZE")


def _seconds(default: float, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, "metavar": "S"})


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one gateway process."""

    max_connections: int = _bound(4096, "connections of clients at a time; more get 503")
    header_timeout_s: float = _seconds(10.0, "seconds for a request's head to arrive")
    body_timeout_s: float = _seconds(30.0, "seconds for a request's body to arrive")
    write_timeout_s: float = _seconds(30.0, "seconds in which a client that reads next to nothing is disconnected")
    request_timeout_s: float = _seconds(3600.0, "seconds for a whole request")
    max_body_bytes: int = _size(8 << 20, "of one request's body")
    max_buffered_bytes: int = _size(512 << 20, "of the bodies of all requests together; more get 429")
    max_in_flight: int = _bound(8192, "choices (prompts times n) of all requests together; more get 429")
    max_queued_tokens: int = _bound(2048, "tokens of one choice that a client may be late with reading")

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            flag, value = flag_of(entry.name), getattr(self, entry.name)
            if isinstance(entry.default, float):
                if not 0 < value < float("inf"):
                    raise ConfigError(f"{flag} is {value}; it must be a positive number of seconds.")
            elif value < 1:
                raise ConfigError(f"{flag} is {value}; it must be at least 1.")
        if self.max_buffered_bytes < 2 * self.max_body_bytes:
            raise ConfigError(
                f"--max-buffered-bytes is {self.max_buffered_bytes}; it must be at least twice --max-body-bytes, "
                f"{self.max_body_bytes}."
            )

    @classmethod
    def add_flags(cls, parser: _TakesFlags) -> None:
        """One flag for each field."""
        for entry in dataclasses.fields(cls):
            options = dict(entry.metadata)
            options.setdefault("type", type(entry.default))
            options["help"] += " (default: %(default)s)"
            parser.add_argument(flag_of(entry.name), default=entry.default, **options)

    @classmethod
    def of_flags(cls, args: argparse.Namespace) -> Self:
        """Raises `ConfigError`."""
        return cls(**{entry.name: getattr(args, entry.name) for entry in dataclasses.fields(cls)})

    def as_flags(self) -> list[str]:
        """The command line that gives these."""
        return [
            part for entry in dataclasses.fields(self) for part in (flag_of(entry.name), str(getattr(self, entry.name)))
        ]


def flag_of(field: str) -> str:
    """max_in_flight → --max-in-flight."""
    return "--" + field.replace("_", "-")
