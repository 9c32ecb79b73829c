"""The configuration of a gateway process: built and validated once by ``__main__.py``, frozen, passed whole.

Owns: the options only the process has, and their checks. Leaves to others: options that the fleet's commands share
(options.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorafleet.controller.gateway.options import HTTP, GatewayOptions, LogLevel
from lorafleet.controller.gateway.tenants import Tenant, tenants_of
from lorafleet.workers.errors import ConfigError, quoted
from lorafleet.workers.options import DAY_S, check_options, nested, option, option_of

FLEET = "fleet"


@dataclass(frozen=True, slots=True)
class SessionTimes:
    """Time limits of a worker session, in seconds. Workers send a heartbeat every 0.5 s."""

    welcome_s: float = 5.0  # from the start of a connection to the worker's Welcome
    suspect_s: float = 1.5  # of silence, after which it gets no new requests while others can take them
    dead_s: float = 5.0  # of silence, after which its requests fail and the session starts again
    slow_step_s: float = option(
        20.0,
        group=FLEET,
        above=0.0,
        maximum=DAY_S,
        help="age of an engine step at which its worker gets no new requests while others can take them",
    )
    first_backoff_s: float = 0.1
    last_backoff_s: float = 2.0

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig(GatewayOptions):
    """One gateway process."""

    controller: str = option(group=FLEET, is_required=True, metavar="HOST:PORT", help="the controller's gRPC address")
    token: str = field(repr=False)  # the fleet's bearer token, for gRPC
    tenants: dict[str, Tenant] = field(default_factory=dict, repr=False)  # by API key, read from `tenants_file`
    port: int = option_of(GatewayOptions, "port", minimum=0, help="port to listen on; 0: any free one")
    log_level: LogLevel = option_of(GatewayOptions, "log_level", default="info")
    num_tokenizer_threads: int = option(
        2,
        group=HTTP,
        minimum=1,
        maximum=1024,
        help="threads for JSON, chat templates and tokenizers; one is kept for short requests",
    )
    vllm_metrics_compat: bool = option(True, group=HTTP, help="also export metrics under vLLM's names")
    reuse_port: bool = option(
        False, group=HTTP, help="let several gateway processes listen on one port, each once it can serve"
    )
    times: SessionTimes = nested(SessionTimes)

    def __post_init__(self) -> None:
        GatewayOptions.__post_init__(self)
        check_address("--controller", self.controller)
        if not self.token:
            raise ConfigError("The token of --token-file is empty.")
        tenants_of(self.api_keys, self.tenants, self.admin_api_keys)


def check_address(flag: str, address: str) -> None:
    """Raises ConfigError unless `address` is HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) <= 65535:
        raise ConfigError(f"{flag} is {quoted(address)}; it must be HOST:PORT.")
