"""Commands on a running Ray cluster: `lorafleet up` starts a fleet that outlives it; `down`, `restart`, `drain`.

Owns: the order of the steps. Leaves to others: Ray (ray_cluster.py), a fleet that ends with its command (serve.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.controller.commands.cluster_watch import FLEET_ENDED, ClusterWatch
from lorafleet.controller.commands.say import say
from lorafleet.controller.commands.signals import Signals, Stopped
from lorafleet.controller.commands.start import wait_for_fleet
from lorafleet.controller.commands.watch import FleetWatch
from lorafleet.controller.config import GatewayNodes, ServeConfig, UpOptions
from lorafleet.controller.fleet.secret_file import write_secret
from lorafleet.workers.address import http_url
from lorafleet.workers.errors import ConfigError, NoRoomError, error_from_code
from lorafleet.workers.server.actor import WorkerFailed

if TYPE_CHECKING:
    from lorafleet.controller.commands.ray_cluster import FleetCluster
    from lorafleet.controller.fleet.actor import FleetReady, Outcome

_POLL_S = 0.5
_ANSWER_S = 60.0
_ROOM_S = 5.0  # between attempts to start a fleet that has no room yet


def up(config: ServeConfig, options: UpOptions) -> None:
    """Start the fleet and leave it running. Idempotent: if it runs with the same flags, wait for it.

    Raises `ConfigError`, after ending what this call has started, unless the fleet has served.
    """
    token_file, token = _token(options.token_file)
    signals = Signals()
    # The configuration describes the fleet, not how this command reaches it. Ray keeps an actor's arguments, so the API
    # keys are left out if the controller starts no gateways.
    wanted = dataclasses.replace(config, ray_address=None)
    if options.gateways == "none":
        wanted = dataclasses.replace(wanted, api_keys=(), admin_api_keys=())
    with contextlib.suppress(Stopped), _joined(options.ray_address, signals) as cluster:
        say("starting controller, workers and gateways ...")
        said = ""
        while True:
            try:
                fleet = _start(
                    cluster,
                    signals,
                    wanted,
                    controller_port=options.controller_port,
                    token=token,
                    gateways_on=options.gateways,
                )
                break
            except NoRoomError as error:
                if not options.follow:
                    raise
                if error.message != said:
                    said = error.message
                    say(f"waiting for nodes: {said}")
                _pause(_ROOM_S, signals)
        _announce(config, fleet, token_file)
        if options.follow:
            _follow(cluster, fleet.last_event, signals)


def _start(
    cluster: FleetCluster,
    signals: Signals,
    wanted: ServeConfig,
    *,
    controller_port: int,
    token: str,
    gateways_on: GatewayNodes,
) -> FleetReady:
    """Start or find the fleet, and return it once it serves. A fleet that fails to start is ended."""
    from lorafleet.controller.fleet.actor import ControllerActor

    is_new = not cluster.find_controller()
    if is_new:
        cluster.create_controller(ControllerActor, wanted, "", controller_port, token, gateways_on=gateways_on)
    elif (was_told := cluster.poll("was_told", wanted, token, gateways_on, timeout_s=_ANSWER_S)) is None:
        raise ConfigError(f"{_NO_ANSWER} for {_ANSWER_S:g} s. `lorafleet status` shows the fleet's last known state.")
    elif not was_told:
        raise ConfigError(
            "This Ray cluster runs a fleet with other flags, or with another token than --token-file. `lorafleet down` "
            "ends it."
        )
    try:
        ready = wait_for_fleet(cluster, signals)
    except BaseException:
        if is_new:
            cluster.end_found_fleet()
        raise
    if isinstance(ready, WorkerFailed):  # it has never served, so it is ended whichever command has started it
        cluster.end_found_fleet()
        raise error_from_code(ready.code, ready.message)
    return ready


def _pause(seconds: float, signals: Signals) -> None:
    """Wait. Raises `Stopped` on a signal."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        signals.check()
        time.sleep(_POLL_S)


def down(ray_address: str, drain_timeout_s: float) -> None:
    """Let the gateways finish their requests, then end the fleet. Raises `ConfigError`."""
    with _joined(ray_address) as cluster:
        num_ended = 0
        if cluster.find_controller():
            cluster.drain_gateways(drain_timeout_s)
            num_ended = cluster.end_found_fleet()
        num_ended += cluster.end_leftovers()
    print(f"ended {num_ended} actors" if num_ended else _NO_FLEET)


def restart(ray_address: str) -> None:
    """Restart the workers one after the other. Raises `ConfigError` if one does not restart."""
    with _joined(ray_address) as cluster:
        if not cluster.find_controller():
            raise ConfigError(f"{_NO_FLEET}; `lorafleet up` starts one.")
        say("restarting the workers, one after the other ...")
        outcome: Outcome | None = None
        while outcome is None:
            outcome = cluster.poll("restart_workers", timeout_s=_ANSWER_S)
    _tell(outcome)


def drain(ray_address: str, drain_timeout_s: float) -> None:
    """Drain this node's workers and gateways. Raises `ConfigError` if they need longer than `drain_timeout_s`."""
    with _joined(ray_address) as cluster:
        if not cluster.find_controller():
            print(_NO_FLEET)
            return
        outcome = cluster.poll("drain_node", cluster.node_id, drain_timeout_s, timeout_s=drain_timeout_s + _ANSWER_S)
    if outcome is None:
        raise ConfigError(f"{_NO_ANSWER}.")
    _tell(outcome)


_NO_ANSWER = "This Ray cluster has a controller, which has not answered"
_NO_FLEET = "no fleet runs on this Ray cluster"


def _tell(outcome: Outcome) -> None:
    if not outcome.succeeded:
        raise ConfigError(outcome.text)
    print(outcome.text)


def _announce(config: ServeConfig, fleet: FleetReady, token_file: Path) -> None:
    print("\n".join(fleet.workers[0].plan))
    print(f"\n{len(fleet.workers)} of {config.num_workers} workers serve; the controller is at {fleet.controller}")
    for node in fleet.gateway_nodes:
        shown = node if config.host in ("", "0.0.0.0", "::") else config.host
        print(f"gateways on {node}: {http_url(shown, config.port)}")
    print(f"more gateways: lorafleet gateway --controller {fleet.controller} --token-file {token_file}")
    print("`lorafleet status` shows the fleet, `lorafleet down` ends it.", flush=True)


def _follow(cluster: FleetCluster, last_event: int, signals: Signals) -> None:
    """Print events until the fleet is ended. Raises `Stopped` on a signal, `ConfigError` when the cluster is lost."""
    fleet, ray = FleetWatch(cluster, last_event, say), ClusterWatch(cluster, say)
    while True:
        signals.check()
        if (lost := ray.look()) == FLEET_ENDED:
            say("the fleet was ended")
            return
        if lost:
            cluster.abandon()
            raise ConfigError(lost)
        signals.num_restarts -= fleet.look(wants_restart=signals.num_restarts > 0)
        time.sleep(_POLL_S)


def _token(path: Path) -> tuple[Path, str]:
    """Return the token's file and the token, which is made if there is none. Raises `ConfigError`."""
    try:
        path = path.expanduser()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_secret(path, secrets.token_urlsafe(32))
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: an unknown user's home
        raise ConfigError(f"--token-file {path} cannot be read or created: {error}.") from error
    if not token:
        raise ConfigError(f"--token-file {path} is empty.")
    return path, token


@contextlib.contextmanager
def _joined(address: str, signals: Signals | None = None) -> Iterator[FleetCluster]:
    """Join a running Ray cluster, and leave it at the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from lorafleet.controller.commands.ray_cluster import FleetCluster

    try:
        # Ray's C++ part replaces our signal handler by one that aborts the process, so ours is set repeatedly.
        cluster = FleetCluster(address, 0, while_waiting=signals.install if signals else lambda: None)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"No Ray cluster can be joined at {address!r}: {error} `ray start --head` starts one; `lorafleet serve` "
            "starts its own."
        ) from error
    try:
        yield cluster
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    finally:
        cluster.leave()
