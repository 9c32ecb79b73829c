"""`lorafleet up` and `lorafleet down`: a fleet on a running Ray cluster that outlives the command.

Owns: the order of things. Leaves to others: Ray (cluster.py), a fleet that lives with its command (launch.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.controller.config import ServeConfig
from lorafleet.controller.secret_file import write_secret
from lorafleet.workers.actor import WorkerFailed
from lorafleet.workers.errors import ConfigError, error_from_code

if TYPE_CHECKING:
    from lorafleet.controller.cluster import FleetCluster

_START_TIMEOUT_S = 900.0
_GATEWAY_START_S = 120.0
_POLL_S = 0.5
_ANSWER_S = 60.0


def up(config: ServeConfig, *, controller_port: int, token_file: Path, gateways_on: str) -> None:
    """Start the fleet and leave it running. Idempotent: one that runs with the same flags is waited for.

    token_file: made if it is not there. gateways_on: "none", "head" or "all" nodes. Raises `ConfigError`; what this
    call has started is ended then.
    """
    from lorafleet.controller.actor import ControllerActor, FleetReady
    from lorafleet.controller.gateway_host import GatewayHostActor

    token = _token(token_file)
    # Ray keeps an actor's arguments, and the controller has no use for the clients' keys.
    wanted = dataclasses.replace(config, api_keys=())
    with _joined(config.ray_address or "auto") as cluster:
        is_new = not cluster.find_controller()
        if is_new:
            _say("starting controller and workers ...")
            cluster.create_controller(ControllerActor, wanted, "", controller_port, token)
        elif not cluster.poll("was_told", wanted, token, timeout_s=_ANSWER_S):
            raise ConfigError(
                f"This Ray cluster runs a fleet with other flags, or another token than that of {token_file}. "
                "`lorafleet down` ends it."
            )
        try:
            deadline = time.monotonic() + _START_TIMEOUT_S
            answer: FleetReady | WorkerFailed | None = None
            while answer is None:
                if time.monotonic() > deadline:
                    raise ConfigError(f"The fleet did not start within {_START_TIMEOUT_S:g} s.")
                answer = cluster.poll("ready", timeout_s=_POLL_S)
            if isinstance(answer, WorkerFailed):
                raise error_from_code(answer.code, answer.message)
            nodes: list[str] = []
            if gateways_on != "none":
                nodes = cluster.host_gateways(
                    GatewayHostActor,
                    (config, answer.controller, token),
                    everywhere=gateways_on == "all",
                    timeout_s=_GATEWAY_START_S,
                )
        except BaseException:
            if is_new:
                cluster.remove_fleet()
            raise
    print("\n".join(answer.workers[0].plan))
    print(f"\n{len(answer.workers)} of {config.num_workers} workers serve; the controller is at {answer.controller}")
    for node in nodes:
        shown = node if config.host in ("0.0.0.0", "::") else config.host
        print(f"gateways on {node}: http://{shown}:{config.port}")
    print(f"more gateways: lorafleet gateway --controller {answer.controller} --token-file {token_file}")
    print("`lorafleet status` shows the fleet, `lorafleet down` ends it.", flush=True)


def down(ray_address: str, drain_timeout_s: float) -> None:
    """Let the gateways finish their requests, then end the fleet. Raises `ConfigError`."""
    with _joined(ray_address) as cluster:
        cluster.drain_gateways(drain_timeout_s)
        num_ended = cluster.remove_fleet()
    print(f"ended {num_ended} actors" if num_ended else "no fleet runs on this Ray cluster")


def _token(path: Path) -> str:
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_secret(path, secrets.token_urlsafe(32))
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path} cannot be read or made: {error}.") from error
    if not token:
        raise ConfigError(f"--token-file {path} is empty.")
    return token


@contextlib.contextmanager
def _joined(address: str) -> Iterator[FleetCluster]:
    """A running Ray cluster, for as long as it takes."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from lorafleet.controller.cluster import FleetCluster

    try:
        cluster = FleetCluster(address, 0, while_waiting=lambda: None)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ConfigError(
            f"No Ray cluster can be joined at {address!r}: {error} `ray start --head` starts one; `lorafleet serve` "
            "brings its own."
        ) from error
    try:
        yield cluster
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    finally:
        cluster.leave()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
