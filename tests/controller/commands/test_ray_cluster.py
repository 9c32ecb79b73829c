"""Ownership of fleets: commands end only their own on a shared Ray cluster. Ray is replaced."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from lorafleet.controller.commands import ray_cluster as module
from lorafleet.controller.commands.ray_cluster import FleetCluster
from lorafleet.controller.fleet import cluster as worker_cluster_module
from lorafleet.controller.fleet.cluster import CONTROLLER_NAME, NAMESPACE, fleet_namespace, group_name

MINE, ANOTHER = "1" * 32, "2" * 32
STRANGERS = {("lorafleet", "somebodys"), ("lorafleet-notes", "lorafleet-worker-0"), ("somebody", "actor")}


class FakeActor:
    def __init__(self, fleet: str) -> None:
        self._actor_id = types.SimpleNamespace(hex=lambda: fleet)


class FakeRay:
    """A cluster's actors and placement groups. `next_fleet` is the identity of the next controller created."""

    def __init__(self) -> None:
        self.actors: dict[tuple[str, str], FakeActor] = {place: FakeActor("") for place in STRANGERS}
        self.groups: dict[str, str] = {}  # states by name
        self.next_fleet = MINE
        self.on_kill: Callable[[tuple[str, str]], None] = lambda place: None
        self.is_quicker = False  # another command takes the controller's name just before us
        self.util = types.SimpleNamespace(
            list_named_actors=lambda all_namespaces: [
                {"namespace": namespace, "name": name} for namespace, name in self.actors
            ],
            placement_group_table=lambda: {name: {"name": name, "state": state} for name, state in self.groups.items()},
            remove_placement_group=self.groups.pop,
        )
        self.exceptions = ray.exceptions

    def init(self, **options: object) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def get_actor(self, name: str, namespace: str) -> Any:
        if (namespace, name) not in self.actors:
            raise ValueError("there is none")
        return self.actors[namespace, name]

    def kill(self, actor: FakeActor, no_restart: bool) -> None:
        (place,) = [place for place, known in self.actors.items() if known is actor]
        del self.actors[place]
        self.on_kill(place)

    def remote(self, actor: type) -> Any:
        def options(name: str, namespace: str, **_: object) -> Any:
            def create(*args: object) -> FakeActor:
                if self.is_quicker:
                    raise ValueError("the name is taken")
                self.add_fleet(self.next_fleet)
                return self.actors[namespace, name]

            return types.SimpleNamespace(remote=create)

        return types.SimpleNamespace(options=options)

    def add_fleet(self, fleet: str, *names: str, has_controller: bool = True) -> None:
        if has_controller:
            self.actors[NAMESPACE, CONTROLLER_NAME] = FakeActor(fleet)
        for name in names:
            self.actors[fleet_namespace(fleet), name] = FakeActor("")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    fake = FakeRay()
    monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(worker_cluster_module, "ray", fake)
    monkeypatch.setattr(worker_cluster_module, "get_placement_group", lambda name: name)
    monkeypatch.setattr(worker_cluster_module, "remove_placement_group", fake.groups.pop)
    monkeypatch.setattr(module, "placement_group", lambda bundles, name: fake.groups.setdefault(name, name))
    monkeypatch.setattr(module, "_POLL_S", 0.0)
    yield fake
    assert fake.actors.keys() >= STRANGERS, "what others keep on the cluster is not touched"


def joined() -> FleetCluster:
    return FleetCluster("10.0.0.1", 0, while_waiting=lambda: None)


@pytest.mark.parametrize(
    ("raised", "told"),
    [(Exception("the node timed out"), "the node timed out"), (ValueError("taken"), "taken")],
)
def test_whatever_ray_raises_at_its_start_is_one_error(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch, raised: Exception, told: str
) -> None:
    def init(**options: object) -> None:
        raise raised

    monkeypatch.setattr(fake, "init", init)
    with pytest.raises(RuntimeError, match=told):
        joined()


def test_a_refused_command_leaves_the_running_fleet(fake: FakeRay) -> None:
    fake.add_fleet(ANOTHER, "lorafleet-worker-0")
    fake.groups[group_name("lorafleet-worker-0", ANOTHER)] = "CREATED"
    before, groups = dict(fake.actors), dict(fake.groups)
    cluster = joined()
    cluster.mark_owner()
    with pytest.raises(RuntimeError, match="already runs a LoRAFleet controller"):
        cluster.create_controller(object)
    cluster.shutdown()
    assert fake.actors == before
    assert fake.groups == groups


def test_a_command_that_loses_a_race_leaves_the_winners_fleet(fake: FakeRay) -> None:
    cluster = joined()
    fake.is_quicker = True
    with pytest.raises(RuntimeError, match="already runs a LoRAFleet controller"):
        cluster.create_controller(object)
    fake.add_fleet(ANOTHER, "lorafleet-worker-0")
    cluster.shutdown()
    assert (NAMESPACE, CONTROLLER_NAME) in fake.actors
    assert (fleet_namespace(ANOTHER), "lorafleet-worker-0") in fake.actors


def test_a_command_ends_its_fleet_with_actors_that_the_controller_was_just_creating(fake: FakeRay) -> None:
    cluster = joined()
    owner = cluster.mark_owner()
    assert owner in fake.groups
    cluster.create_controller(object)
    fake.add_fleet(MINE, "lorafleet-worker-0", "lorafleet-rank-1-of-lorafleet-worker-0", has_controller=False)
    fake.groups[group_name("lorafleet-worker-0", MINE)] = "CREATED"
    fake.groups[group_name("lorafleet-worker-0", ANOTHER)] = "CREATED"
    late = [(fleet_namespace(MINE), "lorafleet-worker-1")]

    def on_kill(place: tuple[str, str]) -> None:
        if place[1] == "lorafleet-worker-0":
            fake.actors |= {place: FakeActor("") for place in late}

    fake.on_kill = on_kill
    cluster.shutdown()
    assert fake.actors.keys() == STRANGERS
    assert fake.groups.keys() == {group_name("lorafleet-worker-0", ANOTHER)}


def test_a_fleet_that_has_replaced_ours_is_left(fake: FakeRay) -> None:
    cluster = joined()
    cluster.create_controller(object)
    fake.add_fleet(ANOTHER, "lorafleet-worker-0")  # ours was ended meanwhile, and another one started
    assert cluster.find_controller()
    cluster.shutdown()
    assert len(fake.actors) == len(STRANGERS) + 2


def test_actors_of_a_lost_controller_are_named_and_ended_only_on_request(fake: FakeRay) -> None:
    fake.add_fleet(ANOTHER, "lorafleet-worker-0", "lorafleet-worker-1", has_controller=False)
    cluster = joined()
    with pytest.raises(RuntimeError, match=r"2 actors of a fleet whose controller is gone, .*`lorafleet down`"):
        cluster.create_controller(object)
    assert len(fake.actors) == len(STRANGERS) + 2
    fake.add_fleet(MINE, "lorafleet-worker-0")
    assert cluster.find_controller()
    assert cluster.end_leftovers() == 2
    assert (fleet_namespace(MINE), "lorafleet-worker-0") in fake.actors
    assert cluster.end_found_fleet() == 2
    assert fake.actors.keys() == STRANGERS
    cluster.leave()
