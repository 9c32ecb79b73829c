"""What commands ask of Ray: a Ray to run on, the controller in it, and the end of a fleet.

With cluster.py every Ray call of the project. Every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import get_placement_group, remove_placement_group

from lorafleet.controller.cluster import DRAIN_GRACE_S, GATEWAY_PREFIX, NAMESPACE, WORKER_PREFIX, actor_names

CONTROLLER_NAME = "lorafleet-controller"
_INIT_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 5.0


class FleetCluster:
    """The launcher's view: a Ray to run on, and the controller in it."""

    def __init__(self, address: str | None, num_actors: int, while_waiting: Callable[[], None]) -> None:
        """Start a Ray of our own (address None) or join a running one. Raises `ConnectionError` and `RuntimeError`.

        num_actors: for how many, which ask for a CPU each, our own must have room, though they share the machine's.
        while_waiting: called every few milliseconds until Ray is there.
        """
        # Not on the main thread, where ray.init sets a handler for SIGTERM that exits in the middle of it and leaves
        # processes behind. On a thread that lasts: the kernel ends Ray's processes with the thread that began them.
        self._is_own = address is None
        _check_reachable(address)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lorafleet-ray")
        starting = self._thread.submit(
            ray.init,
            address=address or "local",
            num_cpus=None if address else max(num_actors, os.cpu_count() or 1),
            namespace=NAMESPACE,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="error",
            configure_logging=True,
        )
        deadline = time.monotonic() + _INIT_TIMEOUT_S
        while not wait([starting], timeout=0.01).done and time.monotonic() < deadline:
            while_waiting()
        while_waiting()
        starting.result(timeout=0)
        self._controller: Any = None
        self._asked: dict[str, Any] = {}  # calls of the controller without an answer yet

    def find_controller(self) -> bool:
        """Use the controller that the cluster has, if it has one."""
        try:
            self._controller = ray.get_actor(CONTROLLER_NAME, NAMESPACE)
        except ValueError:
            self._controller = None
        return self._controller is not None

    @property
    def node_id(self) -> str:
        """Of the node that this runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def still_knows_us(self) -> bool | None:
        """Whether the cluster is the one that was joined, not one in its place; None if it does not answer."""
        try:
            _check_reachable(ray.get_runtime_context().gcs_address)
        except ConnectionError:
            return None
        return any(node["NodeID"] == self.node_id and node["Alive"] for node in ray.nodes())

    def create_controller(self, actor: type, *args: object) -> None:
        """Start the controller, pinned to the head node. Raises `RuntimeError` when the cluster has one already."""
        if self.find_controller():
            raise RuntimeError("This Ray cluster already runs a LoRAFleet controller; `lorafleet down` ends it.")
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
            .remote(*args)
        )

    def poll(self, method: str, *args: object, timeout_s: float) -> Any:
        """The controller's answer, or None when it takes longer than `timeout_s`; then ask again for the same answer.

        Raises `RuntimeError` when the controller died or failed.
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
        """Let all gateways that actors own finish their requests, for at most so long."""
        names = [name for name in self._actor_names() if name.startswith(GATEWAY_PREFIX)]
        with contextlib.suppress(RayError, ValueError):
            drains = [ray.get_actor(name, NAMESPACE).drain.remote(timeout_s) for name in names]
            ray.get(drains, timeout=timeout_s + DRAIN_GRACE_S)

    def remove_fleet(self) -> int:
        """End all our actors; how many there were."""
        names = self._actor_names()
        for name in sorted(names, key=lambda name: name != CONTROLLER_NAME):  # first who would make the others anew
            with contextlib.suppress(RayError, ValueError):
                ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)
        with contextlib.suppress(RayError, ValueError):
            for group in ray.util.placement_group_table().values():
                if group["name"].startswith(WORKER_PREFIX) and group["state"] != "REMOVED":
                    remove_placement_group(get_placement_group(group["name"]))
        return len(names)

    @staticmethod
    def _actor_names() -> list[str]:
        with contextlib.suppress(RayError):
            return actor_names()
        return []

    def leave(self) -> None:
        """Let what runs in the cluster go on without us."""
        self._thread.submit(ray.shutdown).result()
        self._thread.shutdown()

    def shutdown(self) -> None:
        """End our actors, and Ray with them if it is our own."""
        if not self._is_own:  # our own Ray takes its actors with it, and asking it would hang if it has died before us
            self.remove_fleet()
        self.leave()


def _check_reachable(address: str | None) -> None:
    """Ray would try for minutes. Raises `ConnectionError`."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "/" in host or not port.isdecimal():
        return  # "auto", or something that Ray itself refuses
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers there ({error}).") from error
