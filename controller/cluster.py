"""Every Ray call of the project, and nothing else, behind classes that tests replace. Every wait has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from lorafleet.workers.actor import FollowerActor, WorkerActor, WorkerFailed, WorkerReady
from lorafleet.workers.config import EngineConfig, LoRAModule

NAMESPACE = "lorafleet"
CONTROLLER_NAME = "lorafleet-controller"
WORKER_PREFIX = "lorafleet-worker-"
_RANK_PREFIX = "lorafleet-rank-"
_INIT_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 5.0
_PLACE_TIMEOUT_S = 10.0
_LEADS_TIMEOUT_S = 60.0
_GATEWAY_PREFIX = "lorafleet-gateways-"
_DRAIN_GRACE_S = 5.0


class WorkerLost(Exception):
    """The worker's actor is not there now; Ray may be restarting it."""


class FleetImpossible(Exception):
    """Not all nodes together have what the workers' ranks need."""


class WorkerCluster:
    """The controller's view: workers as named actors. Runs inside the controller's actor."""

    def node_address(self) -> str:
        """Of the node that this runs on, as the others of the cluster reach it."""
        return str(ray.util.get_node_ip_address())

    def worker_names(self) -> list[str]:
        """Workers that exist, in whatever state."""
        return [
            actor["name"]
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if actor["namespace"] == NAMESPACE and actor["name"].startswith(WORKER_PREFIX)
        ]

    def create_worker(
        self,
        name: str,
        config: EngineConfig,
        num_workers: int,
        adapters: Sequence[LoRAModule],
        host: str,
        token: str,
        log_level: str,
        hung_step_s: float,
    ) -> None:
        """Ask for a worker, one of `num_workers`; it starts in the background. Does nothing if it exists.

        Workers spread over the nodes. One of several ranks is a placement group with an actor for each. Raises
        `FleetImpossible`, and `WorkerLost` when there is no room for them now.
        """
        with contextlib.suppress(ValueError):
            ray.get_actor(name, NAMESPACE)
            return
        # Where there is no GPU the worker starts without and says so; asking Ray for one would wait for ever.
        on_gpu = config.device == "cuda" and ray.cluster_resources().get("GPU", 0) >= 1
        ranks = config.tensor_parallel_size
        sizes = _node_sizes("GPU" if on_gpu else "CPU")
        _check_room(sizes, num_workers, ranks, "GPU" if on_gpu else "CPU")
        num_hosts = sum(size >= 1 for size in sizes)
        config = dataclasses.replace(config, workers_per_host=-(-num_workers // num_hosts))
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1} if on_gpu else {"num_cpus": 1}
        # A method may have had its effect when the actor died, so none is ever repeated by Ray.
        options |= {"namespace": NAMESPACE, "lifetime": "detached", "max_task_retries": 0}
        arguments = config, tuple(adapters), host, token, log_level, hung_step_s
        if ranks == 1:
            ray.remote(WorkerActor).options(
                name=name, get_if_exists=True, max_restarts=-1, scheduling_strategy="SPREAD", **options
            ).remote(*arguments)
            return
        # Ranks live and die together, so that Ray restarts none of them by itself: we make all anew.
        options["max_restarts"] = 0
        self.remove_worker(name)  # what is left of one that died
        group = _place(name, ranks, "GPU" if on_gpu else "CPU", max(sizes))
        bundles = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank) for rank in range(ranks)]
        leader = (
            ray.remote(WorkerActor).options(name=name, scheduling_strategy=bundles[0], **options).remote(*arguments)
        )
        try:
            leads = ray.get(leader.leads.remote(), timeout=_LEADS_TIMEOUT_S)
        except RayError as error:
            self.remove_worker(name)  # else it would be taken for one that has all its ranks
            raise WorkerLost(f"{name}: {error}") from error
        for rank in range(1, ranks):
            ray.remote(FollowerActor).options(
                name=f"{_RANK_PREFIX}{rank}-of-{name}", scheduling_strategy=bundles[rank], **options
            ).remote(config, rank, leads, token, log_level)

    async def worker_ready(self, name: str, timeout_s: float) -> WorkerReady | WorkerFailed:
        """Wait for a worker's start. Raises `WorkerLost` when it died or did not answer in time."""
        try:
            async with asyncio.timeout(timeout_s):
                actor = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
                answer: WorkerReady | WorkerFailed = await actor.ready.remote()
                return answer
        except (RayError, ValueError, TimeoutError) as error:
            raise WorkerLost(f"{name}: {error}") from error

    def remove_worker(self, name: str) -> None:
        """End a worker for good, with all its ranks."""
        for actor in ray.util.list_named_actors(all_namespaces=True):
            is_of_it = actor["name"] == name or actor["name"].endswith(f"-of-{name}")
            if is_of_it and actor["namespace"] == NAMESPACE:
                with contextlib.suppress(ValueError):
                    ray.kill(ray.get_actor(actor["name"], NAMESPACE), no_restart=True)
        with contextlib.suppress(ValueError):
            remove_placement_group(get_placement_group(name))

    def restart_worker(self, name: str) -> None:
        """End a worker's process, stopped ones too; Ray starts it anew, or, where it has several ranks, `create_worker`
        does, which ends the others."""
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=False)


def _check_reachable(address: str | None) -> None:
    """Ray would try for minutes. Raises `ConnectionError`."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "/" in host or not port.isdecimal():
        return  # "auto", or something that Ray itself refuses
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers there ({error}).") from error


def _node_sizes(resource: str) -> list[float]:
    """How much each node has of a resource, used or not."""
    return [node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]]


def _check_room(sizes: Sequence[float], num_workers: int, ranks: int, resource: str) -> None:
    """Ray would leave what can never be placed pending, without a word."""
    needed = num_workers * ranks
    if sum(map(int, sizes)) < needed:
        raise FleetImpossible(
            f"--num-workers {num_workers} of --tensor-parallel-size {ranks} need {needed} {resource}s; the nodes of "
            f"this Ray cluster have {', '.join(f'{size:g}' for size in sizes)}. Lower one of them, or add nodes."
        )


def _place(name: str, ranks: int, resource: str, largest: float) -> PlacementGroup:
    """A placement group with a bundle for each rank, on one node if the largest one has that much."""
    strategy = "STRICT_PACK" if largest >= ranks else "PACK"
    group = placement_group([{resource: 1}] * ranks, strategy=strategy, name=name, lifetime="detached")
    if not group.wait(_PLACE_TIMEOUT_S):
        remove_placement_group(group)
        raise WorkerLost(f"{name}: there is no room for its {ranks} ranks now; others hold the {resource}s.")
    return group


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
        with contextlib.suppress(ValueError):
            self._controller = ray.get_actor(CONTROLLER_NAME, NAMESPACE)
        return self._controller is not None

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

    def host_gateways(self, actor: type, args: Sequence[object], *, everywhere: bool, timeout_s: float) -> list[str]:
        """Have an actor own gateways on the head node, or on every node; the nodes' addresses. Idempotent.

        Raises `RuntimeError` when some cannot listen.
        """
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if not everywhere:
            nodes = [node for node in nodes if "node:__internal_head__" in node["Resources"]]
        hosts = [
            ray.remote(actor)
            .options(
                name=f"{_GATEWAY_PREFIX}{node['NodeID'][:16]}",
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_task_retries=-1,
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(*args)
            for node in nodes
        ]
        try:
            failures = ray.get([host.ready.remote() for host in hosts], timeout=timeout_s)
        except RayError as error:
            raise RuntimeError(f"The gateways did not start: {error}") from error
        for node, failure in zip(nodes, failures, strict=True):
            if failure:
                raise RuntimeError(f"On node {node['NodeManagerAddress']}: {failure}")
        return [str(node["NodeManagerAddress"]) for node in nodes]

    def drain_gateways(self, timeout_s: float) -> None:
        """Let all gateways that actors own finish their requests, for at most so long."""
        names = [name for name in self._actor_names() if name.startswith(_GATEWAY_PREFIX)]
        with contextlib.suppress(RayError, ValueError):
            drains = [ray.get_actor(name, NAMESPACE).drain.remote(timeout_s) for name in names]
            ray.get(drains, timeout=timeout_s + _DRAIN_GRACE_S)

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
            actors = ray.util.list_named_actors(all_namespaces=True)
            return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
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
