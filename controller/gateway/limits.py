"""Limits on the resources that clients use in a gateway: defaults, ranges, checks.

Owns: declaring each once. Leaves to others: enforcing them (connections.py, api/intake.py, streams/inbox.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.workers.errors import ConfigError
from lorafleet.workers.options import DAY_S, MAX_BYTES, check_options, option

LIMITS = "limits of each gateway process"
_MAX = 10_000_000


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one gateway process."""

    max_connections: int = option(
        4096, group=LIMITS, minimum=1, maximum=_MAX, help="client connections at a time; more get 503"
    )
    header_timeout_s: float = option(
        10.0, group=LIMITS, above=0.0, maximum=DAY_S, help="time for a request's head to arrive"
    )
    body_timeout_s: float = option(
        30.0, group=LIMITS, above=0.0, maximum=DAY_S, help="time for a request's body to arrive"
    )
    write_timeout_s: float = option(
        30.0,
        group=LIMITS,
        above=0.0,
        maximum=DAY_S,
        help="time after which a client that reads next to nothing is disconnected",
    )
    request_timeout_s: float = option(
        3600.0, group=LIMITS, above=0.0, maximum=30 * DAY_S, help="time for a whole request"
    )
    max_body_bytes: int = option(8 << 20, group=LIMITS, minimum=1, maximum=MAX_BYTES, help="size of one request's body")
    max_buffered_bytes: int = option(
        512 << 20,
        group=LIMITS,
        minimum=1,
        maximum=MAX_BYTES,
        help="total size of all requests' bodies, at least twice --max-body-bytes; more get 429",
    )
    max_in_flight: int = option(
        8192,
        group=LIMITS,
        minimum=1,
        maximum=_MAX,
        help="total choices (prompts times n) of all requests; more get 429",
    )
    max_queued_tokens: int = option(
        2048, group=LIMITS, minimum=1, maximum=_MAX, help="unread tokens of one choice that a client may have"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_buffered_bytes < 2 * self.max_body_bytes:
            raise ConfigError(
                f"--max-buffered-bytes is {self.max_buffered_bytes}; it must be at least twice --max-body-bytes, "
                f"{self.max_body_bytes}."
            )
