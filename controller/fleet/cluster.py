"""The controller's calls to Ray: workers and gateways as actors, and the nodes they run on.

This file and commands/ray_cluster.py hold every Ray call of the project, and nothing else, in classes that tests
replace. Every wait has a deadline.

A fleet's identity is Ray's id of its controller actor, which survives restarts. A controller creates everything in a
namespace with this id in its name, so no fleet ever uses, or ends, another fleet's actors.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from lorafleet.workers.config import EngineConfig, LoRAModule
from lorafleet.workers.errors import NoRoomError
from lorafleet.workers.server.actor import FleetSettings, FollowerActor, WorkerActor, WorkerFailed, WorkerReady

NAMESPACE = "lorafleet"  # the controller's; a Ray cluster has one controller, since its name can be taken once
CONTROLLER_NAME = "lorafleet-controller"
WORKER_PREFIX = "lorafleet-worker-"
GATEWAY_PREFIX = "lorafleet-gateways-"  # a node's id follows
_RANK_PREFIX = "lorafleet-rank-"
_PLACE_TIMEOUT_S = 10.0
_LEADS_TIMEOUT_S = 60.0
_NODES_TIMEOUT_S = 10.0
DRAIN_GRACE_S = 5.0  # for gateways that have finished their requests to exit


class WorkerLost(Exception):
    """The worker's actor does not exist now; Ray may be restarting it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A live node of the cluster."""

    node_id: str
    address: str
    is_head: bool


class WorkerCluster:
    """The controller's view of Ray: workers and gateways as named actors. Runs inside the controller's actor."""

    def __init__(self) -> None:
        self._fleet = self.fleet_id()
        self._namespace = fleet_namespace(self._fleet)

    def is_restarted(self) -> bool:
        """Return whether Ray has started this controller before. Raises `WorkerLost` when Ray does not answer."""
        with _answered("the controller"):
            return bool(ray.get_runtime_context().was_current_actor_reconstructed)

    def has_owner(self, owner: str) -> bool:
        """Return whether the command that owns the fleet lives; see commands/ray_cluster.py's `mark_owner`."""
        with _answered("the cluster"):
            groups = ray.util.placement_group_table().values()
            return any(group["name"] == owner and group["state"] != "REMOVED" for group in groups)

    def end_fleet(self) -> None:
        """End every actor this controller has created, then the controller."""
        remove_groups(self._fleet)
        for name in actor_names(self._namespace):
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(name, self._namespace), no_restart=True)
        ray.kill(ray.get_actor(CONTROLLER_NAME, NAMESPACE), no_restart=True)

    def node_address(self) -> str:
        """Return the address at which other nodes reach this one."""
        return str(ray.util.get_node_ip_address())

    def fleet_id(self) -> str:
        """Return the id of the controller's actor: kept when it is restarted, and different for every fleet."""
        return str(ray.get_runtime_context().get_actor_id() or "")

    def worker_names(self) -> list[str]:
        """Return the names of all workers that exist, in whatever state."""
        with _answered("the cluster"):
            return [name for name in actor_names(self._namespace) if name.startswith(WORKER_PREFIX)]

    def create_worker(
        self,
        name: str,
        config: EngineConfig,
        num_workers: int,
        adapters: Sequence[LoRAModule],
        fleet: FleetSettings,
    ) -> None:
        """Create one of `num_workers` workers, which starts in the background. Does nothing if it exists.

        Workers spread over the nodes. A worker of several ranks is a placement group with an actor for each. Raises
        `NoRoomError` if the cluster is too small, `WorkerLost` if others use the room now or Ray does not answer.
        """
        with _answered(name):
            self._create_worker(name, config, num_workers, adapters, fleet)

    def _create_worker(
        self,
        name: str,
        config: EngineConfig,
        num_workers: int,
        adapters: Sequence[LoRAModule],
        fleet: FleetSettings,
    ) -> None:
        with contextlib.suppress(ValueError):
            ray.get_actor(name, self._namespace)
            return
        # Without a GPU the worker starts on the CPU and reports it; a request to Ray for a GPU would wait forever.
        on_gpu = config.device == "cuda" and ray.cluster_resources().get("GPU", 0) >= 1
        ranks = config.tensor_parallel_size
        sizes = _node_sizes("GPU" if on_gpu else "CPU")
        _check_room(sizes, num_workers, ranks, "GPU" if on_gpu else "CPU")
        num_hosts = sum(size >= 1 for size in sizes)
        config = dataclasses.replace(config, workers_per_host=-(-num_workers // num_hosts))
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1} if on_gpu else {"num_cpus": 1}
        # Ray must not repeat a call: it may have had its effect before the actor died.
        options |= {"namespace": self._namespace, "lifetime": "detached", "max_task_retries": 0}
        arguments = config, tuple(adapters), fleet
        if ranks == 1:
            ray.remote(WorkerActor).options(
                name=name, get_if_exists=True, max_restarts=-1, scheduling_strategy="SPREAD", **options
            ).remote(*arguments)
            return
        # Ranks live and die together, so Ray restarts none of them: we create all of them again.
        options["max_restarts"] = 0
        self.remove_worker(name)  # what is left of one that died
        group = _place(group_name(name, self._fleet), ranks, "GPU" if on_gpu else "CPU", max(sizes))
        bundles = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank) for rank in range(ranks)]
        leader = (
            ray.remote(WorkerActor).options(name=name, scheduling_strategy=bundles[0], **options).remote(*arguments)
        )
        try:
            leads = ray.get(leader.leads.remote(), timeout=_LEADS_TIMEOUT_S)
        except RayError as error:
            self.remove_worker(name)  # else it would pass for a worker with all its ranks
            raise WorkerLost(f"{name}: {error}") from error
        for rank in range(1, ranks):
            ray.remote(FollowerActor).options(
                name=f"{_RANK_PREFIX}{rank}-of-{name}", scheduling_strategy=bundles[rank], **options
            ).remote(config, rank, leads, fleet)

    async def worker_ready(self, name: str, timeout_s: float) -> WorkerReady | WorkerFailed:
        """Wait for a worker's start. Raises `WorkerLost` if it died, or was not ready in time and is ended for that."""
        try:
            async with asyncio.timeout(timeout_s):
                actor = await asyncio.to_thread(ray.get_actor, name, self._namespace)
                answer: WorkerReady | WorkerFailed = await actor.ready.remote()
                return answer
        except TimeoutError as error:
            await asyncio.to_thread(self.restart_worker, name)
            raise WorkerLost(f"{name} did not start within {timeout_s:g} s") from error
        except (RayError, RuntimeError, ValueError) as error:
            raise WorkerLost(f"{name}: {error}") from error

    def remove_worker(self, name: str) -> None:
        """End a worker and all its ranks for good. Raises `WorkerLost` when Ray does not answer."""
        with _answered(name):
            for actor in self._actors_of(name):
                ray.kill(actor, no_restart=True)
            with contextlib.suppress(ValueError):
                remove_placement_group(get_placement_group(group_name(name, self._fleet)))

    def restart_worker(self, name: str) -> None:
        """Kill a worker's process, even a stopped one. Raises `WorkerLost` when Ray does not answer.

        Ray then starts it again; for a worker of several ranks `create_worker` does, after it has ended the others.
        """
        with _answered(name), contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, self._namespace), no_restart=False)

    def nodes_of(self, name: str) -> set[str]:
        """Return the ids of the nodes with a rank of this worker, as far as its ranks answer."""
        asked = [actor.__ray_call__.remote(_own_node_id) for actor in self._actors_of(name)]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_NODES_TIMEOUT_S) if asked else ([], [])
        found = set()
        for answer in answered:
            with contextlib.suppress(RayError):
                found.add(str(ray.get(answer, timeout=0)))
        return found

    def nodes(self) -> list[Node]:
        """Return the live nodes. Raises `WorkerLost` when Ray does not answer."""
        with _answered("the cluster"):
            return [
                Node(node["NodeID"], node["NodeManagerAddress"], "node:__internal_head__" in node["Resources"])
                for node in ray.nodes()
                if node["Alive"]
            ]

    def gateway_nodes(self) -> set[str]:
        """Return the ids of the nodes, alive or not, that have an actor for gateways."""
        with _answered("the cluster"):
            names = actor_names(self._namespace)
        return {name.removeprefix(GATEWAY_PREFIX) for name in names if name.startswith(GATEWAY_PREFIX)}

    def host_gateways(self, node_id: str, actor: type, *args: object) -> None:
        """Create the actor that owns a node's gateways. Does nothing if it exists."""
        with _answered("the cluster"):
            ray.remote(actor).options(
                name=f"{GATEWAY_PREFIX}{node_id}",
                namespace=self._namespace,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_task_retries=0,
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(*args)

    async def gateways_listen(self, node_id: str, timeout_s: float) -> str:
        """Wait until a node's gateways listen. Return why they cannot, or an empty string."""
        try:
            async with asyncio.timeout(timeout_s):
                actor = await asyncio.to_thread(ray.get_actor, f"{GATEWAY_PREFIX}{node_id}", self._namespace)
                return str(await actor.ready.remote())
        except (RayError, RuntimeError, ValueError) as error:
            return f"the actor of its gateways is not there: {error}"
        except TimeoutError:
            return f"its gateways did not listen within {timeout_s:g} s"

    async def drain_gateways(self, node_id: str, timeout_s: float) -> None:
        """Let a node's gateways finish their requests, for at most `timeout_s`, and exit."""
        with contextlib.suppress(RayError, RuntimeError, ValueError, TimeoutError):
            async with asyncio.timeout(timeout_s + DRAIN_GRACE_S):
                actor = await asyncio.to_thread(ray.get_actor, f"{GATEWAY_PREFIX}{node_id}", self._namespace)
                await actor.drain.remote(timeout_s)

    def remove_gateways(self, node_id: str) -> None:
        """End the actor of a node's gateways, and them with it. Raises `WorkerLost` when Ray does not answer."""
        with _answered("the cluster"), contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(f"{GATEWAY_PREFIX}{node_id}", self._namespace), no_restart=True)

    def _actors_of(self, worker: str) -> list[Any]:
        """Return the actors of a worker's ranks."""
        found = []
        for name in actor_names(self._namespace):
            if name == worker or name.endswith(f"-of-{worker}"):
                with contextlib.suppress(ValueError):
                    found.append(ray.get_actor(name, self._namespace))
        return found


def fleet_namespace(fleet: str) -> str:
    """Return the namespace of the actors a controller creates. fleet: the id of its actor."""
    return f"{NAMESPACE}-{fleet}"


def group_name(worker: str, fleet: str) -> str:
    """Return the name of a worker's placement group; such names are global to the cluster."""
    return f"{worker}@{fleet}"


def actor_names(namespace: str) -> list[str]:
    """Return the names of all actors in a namespace that are not dead."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == namespace]


def remove_groups(fleet: str) -> None:
    """Remove the placement groups of a fleet's workers."""
    for group in ray.util.placement_group_table().values():
        if group["name"].endswith(f"@{fleet}") and group["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # it was removed meanwhile
                remove_placement_group(get_placement_group(group["name"]))


@contextlib.contextmanager
def _answered(what: str) -> Iterator[None]:
    """Turn the errors Ray raises while its store does not answer into `WorkerLost`."""
    try:
        yield
    except (RayError, RuntimeError, ConnectionError, TimeoutError) as error:
        raise WorkerLost(f"{what}: Ray does not answer: {error}") from error


def _own_node_id(actor: object) -> str:
    return str(ray.get_runtime_context().get_node_id())


def _node_sizes(resource: str) -> list[float]:
    """Return each node's total of a resource, used or not."""
    return [node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]]


def _check_room(sizes: Sequence[float], num_workers: int, ranks: int, resource: str) -> None:
    """Raise `NoRoomError` if the workers can never be placed: Ray would silently leave them pending."""
    needed = num_workers * ranks
    if sum(map(int, sizes)) < needed:
        raise NoRoomError(
            f"--num-workers {num_workers} of --tensor-parallel-size {ranks} need {needed} {resource}s; the nodes of "
            f"this Ray cluster have {', '.join(f'{size:g}' for size in sizes)}. Lower one of them, or add nodes."
        )


def _place(name: str, ranks: int, resource: str, largest: float) -> PlacementGroup:
    """Return a placement group with a bundle for each rank, on one node if the largest is large enough."""
    strategy = "STRICT_PACK" if largest >= ranks else "PACK"
    group = placement_group([{resource: 1}] * ranks, strategy=strategy, name=name, lifetime="detached")
    if not group.wait(_PLACE_TIMEOUT_S):
        remove_placement_group(group)
        raise WorkerLost(f"{name}: there is no room for its {ranks} ranks now; others hold the {resource}s.")
    return group
