"""Starts a fleet on one command, watches it, and stops it: Ray, controller, workers, gateways.

Everything that was started is stopped again, however `serve` ends: drained on the first signal, at once on the second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.controller.commands.cluster_watch import FLEET_ENDED, ClusterWatch
from lorafleet.controller.commands.say import say
from lorafleet.controller.commands.signals import Signals, Stopped
from lorafleet.controller.commands.start import wait_for_fleet
from lorafleet.controller.commands.watch import FleetWatch
from lorafleet.controller.config import ServeConfig
from lorafleet.controller.fleet.gateway_processes import GatewayProcesses
from lorafleet.controller.fleet.secret_file import write_secret
from lorafleet.workers.address import http_url, own_address
from lorafleet.workers.errors import ConfigError, cut, error_from_code, quoted
from lorafleet.workers.server.actor import WorkerFailed, WorkerReady
from lorafleet.workers.sources.models import read_ahead

if TYPE_CHECKING:
    from lorafleet.controller.commands.ray_cluster import FleetCluster
    from lorafleet.controller.fleet.actor import FleetReady

_GATEWAY_START_S = 60.0
_POLL_S = 0.1
_DRAINED_S = 5.0  # after the drain's time limit
_LOST_S = 0.0  # drain time when the fleet is lost
_CUT_S = 3.0  # for the answers to aborted requests


def serve(config: ServeConfig) -> None:
    """Run a fleet until a signal ends it. Raises `LoRAFleetError` if it cannot start; nothing is left running then."""
    signals = Signals()
    signals.install()
    _check_port(config.host, config.port)
    began = time.monotonic()
    lost = ""
    with contextlib.ExitStack() as stack:
        try:
            state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorafleet-")))
            token_file = write_secret(state_dir / "token", secrets.token_urlsafe(32))
            node = "127.0.0.1" if config.ray_address is None else _node_address()
            controller_port = _free_port(node)
            # Gateways start, and the weights are read from disk, while Ray starts; without a worker a single gateway
            # answers /ready with 503.
            read_ahead(Path(config.engine.model))
            gateways = stack.enter_context(GatewayProcesses(config, f"{node}:{controller_port}", token_file))
            say(f"starting Ray, controller and {_count(config.num_workers, 'worker')} ...")
            cluster, ready = stack.enter_context(
                _fleet(
                    config,
                    node=node,
                    port=controller_port,
                    token=token_file.read_text(),
                    state_dir=state_dir,
                    signals=signals,
                )
            )
            _wait_for_gateways(config, gateways, signals)
            _announce(config, ready.workers, time.monotonic() - began)
            lost = _stay(cluster, ready, gateways, signals)
        except Stopped:
            pass
        if lost:
            say(f"{lost} Ending what is left of the fleet ...")
            _drain_gateways(gateways, _LOST_S, signals)
            if lost != FLEET_ENDED:
                cluster.abandon()
        elif signals.count:
            say(f"draining (at most {config.drain_timeout_s:g} s; press Ctrl-C again to stop at once) ...")
            _drain_gateways(gateways, config.drain_timeout_s, signals)
    if lost:
        raise ConfigError(lost)
    say("stopped")


def _stay(cluster: FleetCluster, ready: FleetReady, gateways: GatewayProcesses, signals: Signals) -> str:
    """Print events until a signal comes or the fleet can no longer serve. Return why it cannot, or an empty string."""
    fleet, ray = FleetWatch(cluster, ready.last_event, say), ClusterWatch(cluster, say)
    while not signals.count:
        if lost := ray.look():
            return lost
        signals.num_restarts -= fleet.look(wants_restart=signals.num_restarts > 0)
        for what in gateways.replace_lost():
            say(what)
        time.sleep(_POLL_S)
    return ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _check_port(host: str, port: int) -> None:
    """Raise `ConfigError`, before Ray starts, if the gateway could not listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"Cannot listen on {cut(host)}:{port}: {error.strerror}. Choose another --port or --host."
            ) from error
        except (TypeError, UnicodeError) as error:  # not a name that can be looked up
            raise ConfigError(f"--host {quoted(host)} is no host's name or address.") from error


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _node_address() -> str:
    """Return this node's address as others see it: the local address of the default route."""
    try:
        return own_address("192.0.2.1")
    except OSError:  # no route
        return "127.0.0.1"


def _drain_gateways(gateways: GatewayProcesses, timeout_s: float, signals: Signals) -> None:
    """Drain the gateways for `timeout_s` or until a second signal, then abort the rest, each with an answer."""
    gateways.terminate()
    deadline = time.monotonic() + timeout_s + _DRAINED_S
    while not gateways.have_ended and time.monotonic() < deadline and signals.count < 2:
        time.sleep(_POLL_S)
    gateways.terminate()
    deadline = time.monotonic() + _CUT_S
    while not gateways.have_ended and time.monotonic() < deadline:
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _fleet(
    config: ServeConfig, *, node: str, port: int, token: str, state_dir: Path, signals: Signals
) -> Iterator[tuple[FleetCluster, FleetReady]]:
    """Run Ray with controller and workers, ready to serve."""
    if config.ray_address is None:
        # A Ray of our own, closed to other users of the machine. Set before Ray is imported.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(write_secret(state_dir / "ray-token", secrets.token_hex(32)))
        # Ray would give workers the lowest priority (nice 15), so any other load here would delay each step.
        os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

    from lorafleet.controller.commands.ray_cluster import FleetCluster
    from lorafleet.controller.fleet.actor import ControllerActor

    signals.check()
    try:
        # Ray's C++ part replaces our signal handler by one that aborts the process, so ours is set repeatedly.
        num_actors = config.num_workers * config.engine.tensor_parallel_size
        cluster = FleetCluster(config.ray_address, num_actors, while_waiting=signals.install)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(f"Ray could not be started or joined: {error}") from error
    try:
        signals.check()
        try:
            # Ray keeps an actor's arguments, and the controller does not need the clients' keys.
            told = dataclasses.replace(config, api_keys=(), admin_api_keys=())
            owner = cluster.mark_owner() if config.ray_address is not None else ""
            cluster.create_controller(ControllerActor, told, node, port, token, owner=owner)
            ready = wait_for_fleet(cluster, signals)
            if isinstance(ready, WorkerFailed):
                raise error_from_code(ready.code, ready.message)
            yield cluster, ready
        except RuntimeError as error:
            raise ConfigError(str(error)) from error
    finally:
        cluster.shutdown()


def _wait_for_gateways(config: ServeConfig, gateways: GatewayProcesses, signals: Signals) -> None:
    deadline = time.monotonic() + _GATEWAY_START_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no $http_proxy: the gateway is our own
    while time.monotonic() < deadline:
        signals.check()
        gateways.check()
        if gateways.are_listening:
            with contextlib.suppress(urllib.error.URLError, OSError):
                opener.open(f"{http_url(config.host, config.port)}/ready", timeout=2).close()
                return
        time.sleep(_POLL_S)
    raise ConfigError(f"The gateways were not ready within {_GATEWAY_START_S:g} s.")


def _announce(config: ServeConfig, workers: tuple[WorkerReady, ...], seconds: float) -> None:
    """Print the memory plan, the adapters served, and commands to paste."""
    url, base = http_url(config.host, config.port), config.served_model_names[0]
    if len(workers) > 1:
        print(f"{_count(len(workers), 'worker')}, each with this")
    print("\n".join(workers[0].plan))
    for adapter in workers[0].adapters:
        print(f"  adapter {adapter.name:<18} rank {adapter.lora_rank:>3}  {adapter.digest[:12]}  {adapter.root}")
    print(f"\nready in {seconds:.1f} s: {url}  (OpenAI API under {url}/v1)\n")
    key = " -H 'Authorization: Bearer YOUR-KEY'" if config.api_keys or config.tenants_file else ""
    print(f"curl {url}/v1/models{key}")
    models = [base, workers[0].adapters[0].name if workers[0].adapters else base]
    prompts = [
        "What is the capital of France?",
        "Table: cars(id, brand, price)\nQuestion: Which cars cost more than 9000 price?",
    ]
    for model, prompt in zip(models, prompts, strict=True):
        body = json.dumps(
            {"model": model, "temperature": 0, "max_tokens": 60, "messages": [{"role": "user", "content": prompt}]}
        )
        print(f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    print("\nCtrl-C stops the server.", flush=True)
