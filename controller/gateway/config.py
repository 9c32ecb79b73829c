"""What a gateway process is told: built and validated once by ``__main__.py``, frozen, passed whole.

Owns: the fields, their defaults and checks. Leaves to others: flags (__main__.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorafleet.controller.gateway.api_keys import check_keys
from lorafleet.controller.gateway.limits import Limits
from lorafleet.controller.gateway.tenants import Tenant, tenants_of
from lorafleet.workers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SessionTimes:
    """How patient a worker session is, in seconds. Workers send a heartbeat every 0.5 s."""

    welcome_s: float = 5.0  # from the start of a connection to the worker's Welcome
    suspect_s: float = 1.5  # of silence: no new requests while others can take them
    dead_s: float = 5.0  # of silence: its requests fail and the session starts anew
    slow_step_s: float = 20.0  # an engine step older than this makes the worker suspect
    first_backoff_s: float = 0.1
    last_backoff_s: float = 2.0


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """One gateway process."""

    controller: str  # host:port
    token: str = field(repr=False)  # the fleet's bearer token, for gRPC
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # each is a tenant of its own
    tenants: dict[str, Tenant] = field(
        default_factory=dict, repr=False
    )  # by API key; without any key none is asked for
    admin_api_keys: tuple[str, ...] = field(default=(), repr=False)  # that may load and unload adapters
    seed: int | None = None  # of the seeds drawn for requests without one; None: the operating system's
    drain_timeout_s: float = 30.0
    worker_wait_s: float = 60.0  # for a worker that takes a request, or goes on with it
    num_tokenizer_threads: int = 2
    vllm_metrics: bool = True
    reuse_port: bool = False  # several gateway processes on one port
    times: SessionTimes = field(default_factory=SessionTimes)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_address("--controller", self.controller)
        if not self.token:
            raise ConfigError("The token of --token-file is empty.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be between 0 and 65535.")
        check_keys("--api-key", self.api_keys)
        check_keys("--admin-api-key", self.admin_api_keys)
        tenants_of(self.api_keys, self.tenants, self.admin_api_keys)
        if self.num_tokenizer_threads < 1:
            raise ConfigError(f"--num-tokenizer-threads is {self.num_tokenizer_threads}; it must be at least 1.")
        if not 0 < self.times.slow_step_s < float("inf"):
            raise ConfigError(f"--slow-step-s is {self.times.slow_step_s}; it must be a positive number of seconds.")
        for flag, seconds in (("--drain-timeout-s", self.drain_timeout_s), ("--worker-wait-s", self.worker_wait_s)):
            if not 0 <= seconds < float("inf"):
                raise ConfigError(f"{flag} is {seconds}; it must be 0 or more seconds.")


def check_address(flag: str, address: str) -> None:
    """Raises ConfigError unless `address` is host:port."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise ConfigError(f"{flag} is {address!r}; it must be HOST:PORT.")
