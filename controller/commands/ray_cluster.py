"""The commands' calls to Ray: starting or joining a cluster, its controller, the end of a fleet.

This file and fleet/cluster.py hold every Ray call of the project. Every wait has a deadline. Actors are ended only by
their fleet's identity (fleet/cluster.py), so a command never ends a fleet it did not start or find.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import placement_group

from lorafleet.controller.commands.cluster_watch import FLEET_ENDED
from lorafleet.controller.commands.lasting_thread import LastingThread
from lorafleet.controller.fleet.cluster import (
    CONTROLLER_NAME,
    DRAIN_GRACE_S,
    GATEWAY_PREFIX,
    NAMESPACE,
    actor_names,
    fleet_namespace,
    remove_groups,
)

_INIT_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 5.0
_ANSWER_S = 30.0  # for Ray's store to answer
_END_S = 10.0  # for killed actors to end
_LEAVE_S = 15.0
_POLL_S = 0.1
_LOOKS_WITHOUT = 3  # looks that must find no actors: the controller may have been creating some
_SETTLE_S = 2.0


class FleetCluster:
    """A command's view of Ray: the cluster, and the controller in it."""

    def __init__(self, address: str | None, num_actors: int, while_waiting: Callable[[], None]) -> None:
        """Start our own Ray (address None) or join a running one. Raises `ConnectionError` or `RuntimeError`.

        num_actors: our own Ray gets at least so many CPUs, one per actor, though they share the machine's.
        while_waiting: called every few milliseconds until Ray has started.
        """
        # Not on the main thread, where ray.init sets a SIGTERM handler that exits half-way and leaves processes behind.
        # On a lasting thread, since the kernel ends Ray's processes with the thread that started them.
        self._is_own = address is None
        _check_reachable(address)
        self._thread = LastingThread("lorafleet-ray")
        self._asking = LastingThread("lorafleet-ask")  # for calls that may never return
        starting = self._thread.submit(
            lambda: ray.init(
                address=address or "local",
                num_cpus=None if address else max(num_actors, os.cpu_count() or 1),
                namespace=NAMESPACE,
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level="error",
                configure_logging=True,
            )
        )
        deadline = time.monotonic() + _INIT_TIMEOUT_S
        while not wait([starting], timeout=0.01).done and time.monotonic() < deadline:
            while_waiting()
        while_waiting()
        try:
            starting.result(timeout=0)
        except ConnectionError:
            raise
        except TimeoutError:
            raise RuntimeError(f"it has not answered within {_INIT_TIMEOUT_S:g} s.") from None
        except Exception as error:  # Ray raises plain ones, when its processes do not answer in time for example
            raise RuntimeError(str(error) or type(error).__name__) from error
        self._is_abandoned = False
        self._controller: Any = None
        self._made = ""  # id of the fleet that this command has started, and owns
        self._owner: Any = None
        self._asked: dict[str, Any] = {}  # unanswered calls to the controller, by method

    def find_controller(self) -> bool:
        """Use the cluster's controller. Return whether it has one."""
        try:
            self._controller = ray.get_actor(CONTROLLER_NAME, NAMESPACE)
        except ValueError:
            self._controller = None
        except RayError as error:
            raise RuntimeError(f"Ray does not answer: {error}") from error
        return self._controller is not None

    @property
    def node_id(self) -> str:
        """Return the id of this node."""
        return str(ray.get_runtime_context().get_node_id())

    def ask_if_it_lives(self) -> Future[str]:
        """Ask what is wrong with the cluster or this command's fleet; an empty string if both are there.

        A future with an exception, or without a result, means that the cluster does not answer now.
        """
        return self._asking.submit(self._ailment)

    def _ailment(self) -> str:
        _check_reachable(ray.get_runtime_context().gcs_address)
        if not any(node["NodeID"] == self.node_id and node["Alive"] for node in ray.nodes()):
            return "The Ray cluster was restarted, or has dropped this node."
        try:
            found = _fleet_of(ray.get_actor(CONTROLLER_NAME, NAMESPACE))
        except ValueError:
            found = ""
        return "" if found == _fleet_of(self._controller) else FLEET_ENDED

    def dead_processes(self) -> list[str]:
        """Return a text for each process of our own Ray that has ended though Ray needs it."""
        if (node := self._own_node()) is None:
            return []
        dead = [(name, process.returncode) for name, process in node.dead_processes() if name in _NEEDED]
        return [f"{name} ended with exit code {code}" for name, code in dead]

    def _own_node(self) -> Any:
        """Return Ray's record of its processes; None if the cluster is not our own."""
        return ray._private.worker._global_node if self._is_own else None

    def abandon(self) -> None:
        """Make no more calls to Ray, since it is lost and they would hang."""
        self._is_abandoned = True

    def mark_owner(self) -> str:
        """Create a mark in the cluster that Ray removes when this command ends, however it does. Return its name."""
        name = f"lorafleet-owner-{uuid.uuid4().hex}"
        self._owner = placement_group([{"node:__internal_head__": 0.001}], name=name)
        return name

    def create_controller(self, actor: type, *args: object, **options: object) -> None:
        """Start the controller, pinned to the head node. Raises `RuntimeError` if the cluster already has one, or the
        remains of one."""
        if self.find_controller():
            raise RuntimeError(_RUNS_ALREADY)
        if not self._is_own and (left := self._leftovers()):
            raise RuntimeError(
                f"This Ray cluster has {len(left)} actors of a fleet whose controller is gone, such as {left[0][1]!r}; "
                "`lorafleet down` ends them."
            )
        try:
            self._controller = (
                ray.remote(actor)
                .options(
                    name=CONTROLLER_NAME,
                    namespace=NAMESPACE,
                    lifetime="detached",
                    max_restarts=-1,
                    max_task_retries=-1,
                    num_cpus=0,
                    resources={"node:__internal_head__": 0.001},
                )
                .remote(*args, **options)
            )
        except ValueError as error:  # another command has just started one
            raise RuntimeError(_RUNS_ALREADY) from error
        self._made = _fleet_of(self._controller)

    def poll(self, method: str, *args: object, timeout_s: float) -> Any:
        """Return the controller's answer, or None after `timeout_s`; the next call then waits for the same answer.

        Raises `RuntimeError` if the controller died or failed.
        """
        reference = self._asked.pop(method, None) or getattr(self._controller, method).remote(*args)
        try:
            return ray.get(reference, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            self._asked[method] = reference
            return None
        except RayActorError as error:
            raise RuntimeError(f"The controller died: {error}") from error
        except RayError as error:
            raise RuntimeError(f"The controller failed: {error}") from error

    def drain_gateways(self, timeout_s: float) -> None:
        """Let the gateways that the fleet's actors own finish their requests, for at most `timeout_s`."""
        if self._controller is None:
            return
        namespace = fleet_namespace(_fleet_of(self._controller))
        with contextlib.suppress(RayError, ValueError):
            names = [name for name in actor_names(namespace) if name.startswith(GATEWAY_PREFIX)]
            drains = [ray.get_actor(name, namespace).drain.remote(timeout_s) for name in names]
            ray.get(drains, timeout=timeout_s + DRAIN_GRACE_S)

    def end_found_fleet(self) -> int:
        """End the fleet of the controller found. Return how many actors it had."""
        return _end_fleet(_fleet_of(self._controller)) if self._controller is not None else 0

    def end_leftovers(self) -> int:
        """End the actors of fleets without a controller. Return how many there were."""
        return sum(map(_end_fleet, {fleet for fleet, _ in self._leftovers()}))

    def _leftovers(self) -> list[tuple[str, str]]:
        """Return (fleet, name) of the actors whose controller no longer exists."""
        actors = ray.util.list_named_actors(all_namespaces=True)
        current = _fleet_of(self._controller) if self.find_controller() else ""
        found = [(_NAMESPACE.fullmatch(actor["namespace"]), str(actor["name"])) for actor in actors]
        return [(match[1], name) for match, name in found if match and match[1] != current]

    def leave(self) -> None:
        """Disconnect from Ray; the actors in the cluster keep running."""
        if not self._is_abandoned:
            self._settle()
            if wait([self._thread.submit(ray.shutdown)], timeout=_LEAVE_S).done:
                self._thread.end()
                return
        # A half-dead Ray would make us wait and then abort us, and its descendants would wait for it too.
        if (node := self._own_node()) is not None:
            _kill_with_descendants([info.process.pid for infos in node.all_processes.values() for info in infos])
        atexit.register(os._exit, 1)

    def shutdown(self) -> None:
        """End the fleet that this command has started, and Ray too if it is our own."""
        if self.dead_processes():
            self.abandon()
        if not self._is_abandoned:
            ending = self._asking.submit(self._end_made)
            with contextlib.suppress(RayError, RuntimeError, TimeoutError):
                ending.result(timeout=_ANSWER_S)
        self.leave()

    def _end_made(self) -> None:
        """End the fleet and the mark, even in our own Ray, which would otherwise print that actors died with it."""
        self._settle()
        if self._made:
            _end_fleet(self._made)
        if self._owner is not None:
            ray.util.remove_placement_group(self._owner)

    def _settle(self) -> None:
        """Finish or cancel unanswered calls, since Ray prints a message for each that its shutdown cuts short."""
        asked, self._asked = list(self._asked.values()), {}
        if not asked:
            return
        _, unanswered = ray.wait(asked, num_returns=len(asked), timeout=_SETTLE_S, fetch_local=False)
        for call in unanswered:
            ray.cancel(call, recursive=False)
        if unanswered:
            ray.wait(unanswered, num_returns=len(unanswered), timeout=_SETTLE_S, fetch_local=False)


_NAMESPACE = re.compile(rf"{NAMESPACE}-([0-9a-f]{{32}})")
_NEEDED = ("raylet", "gcs_server")
_RUNS_ALREADY = "This Ray cluster already runs a LoRAFleet controller; `lorafleet down` ends it."


def _fleet_of(controller: Any) -> str:
    """Return a fleet's identity; see fleet/cluster.py."""
    return str(controller._actor_id.hex())


def _end_fleet(fleet: str) -> int:
    """End a fleet's actors and wait until they have ended. Return how many there were.

    The controller is ended first, since it would create the others again.
    """
    num_ended = 0
    with contextlib.suppress(RayError, ValueError):
        controller = ray.get_actor(CONTROLLER_NAME, NAMESPACE)
        if _fleet_of(controller) == fleet:
            ray.kill(controller, no_restart=True)
            num_ended = 1
    namespace, seen = fleet_namespace(fleet), set[str]()
    deadline, num_looks_without = time.monotonic() + _END_S, 0
    with contextlib.suppress(RayError):
        while num_looks_without < _LOOKS_WITHOUT and time.monotonic() < deadline:
            names = actor_names(namespace)
            for name in names:
                seen.add(name)
                with contextlib.suppress(ValueError):
                    ray.kill(ray.get_actor(name, namespace), no_restart=True)
            num_looks_without = 0 if names else num_looks_without + 1
            time.sleep(_POLL_S)
        remove_groups(fleet)
    return num_ended + len(seen)


def _kill_with_descendants(pids: Sequence[int]) -> None:
    found = list(pids)
    for pid in found:  # grows in the loop
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    for pid in found:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _check_reachable(address: str | None) -> None:
    """Raise `ConnectionError` if nothing listens there: Ray would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "/" in host or not port.isdecimal():
        return  # "auto", or an address that Ray itself refuses
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers there ({error}).") from error
