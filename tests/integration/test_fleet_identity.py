"""Fleets on a Ray cluster that several commands use: no fleet ends, or uses, another one's actors."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from serving import Server, free_port, start, wait_until

LORAFLEET = str(Path(sys.executable).parent / "lorafleet")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LORAFLEET, *arguments], capture_output=True, text=True, timeout=180, check=False)


def actors() -> set[tuple[str, str]]:
    """Return (namespace, name) of all actors of the cluster."""
    return {(actor["namespace"], actor["name"]) for actor in ray.util.list_named_actors(all_namespaces=True)}


def serve(cluster: Cluster, model: Path) -> Server:
    server = start(
        str(model),
        *("--served-model-name", "tiny", "--dtype", "float32", "--drain-timeout-s", "2"),
        *("--ray-address", cluster.address),
    )
    server.wait_until_ready()
    return server


def test_a_fleet_is_ended_by_its_own_command_alone(cluster: Cluster, tiny_model: Path, tmp_path: Path) -> None:
    address = ("--ray-address", cluster.address)
    ray.init(address=cluster.address, namespace="somebody", log_to_driver=False)
    try:

        @ray.remote(num_cpus=0)
        class Stranger:
            pass

        remote: Any = Stranger  # as its decorator left it
        strangers = [
            remote.options(name=name, namespace=namespace, lifetime="detached").remote()
            for namespace, name in (("lorafleet", "somebodys"), ("lorafleet-notes", "lorafleet-worker-0"))
        ]
        ray.get([stranger.__ray_ready__.remote() for stranger in strangers])
        of_strangers = actors()

        first = serve(cluster, tiny_model)
        answer = first.complete("tiny", ["the quick"])
        of_first = actors()
        assert len(of_first - of_strangers) == 2, "a controller and a worker"
        second = run("serve", str(tiny_model), "--port", str(free_port()), *address)
        assert second.returncode == 1
        assert "already runs a LoRAFleet controller" in second.stderr
        up = run(
            *("up", str(tiny_model), "--port", str(free_port()), "--token-file", str(tmp_path / "token"), *address),
            *("--controller-port", str(free_port())),
        )
        assert up.returncode == 1
        assert "a fleet with other flags" in up.stderr
        assert actors() == of_first
        assert first.complete("tiny", ["the quick"]) == answer

        first.process.send_signal(signal.SIGKILL)
        wait_until(lambda: actors() == of_strangers, "its fleet ends with a command that was killed", 60)
        first.stop()

        again = serve(cluster, tiny_model)
        assert again.complete("tiny", ["the quick"]) == answer
        (namespace,) = {namespace for namespace, name in actors() - of_strangers if "worker" in name}
        ray.kill(ray.get_actor("lorafleet-controller", "lorafleet"))
        assert again.process.wait(60) == 1
        assert again.output.splitlines()[-1] == "lorafleet: error: The fleet was ended by another command."
        assert actors() == of_strangers, "a command ends all of what it has made"
        again.stop()
        assert namespace != "lorafleet"

        third = serve(cluster, tiny_model)
        ended = run("down", *address)
        assert (ended.returncode, ended.stdout) == (0, "ended 2 actors\n"), ended.stderr
        assert third.process.wait(60) == 1
        third.stop()

        fourth = serve(cluster, tiny_model)
        assert fourth.stop(signal.SIGHUP) == 0, fourth.output
        assert "(raylet)" not in fourth.output and ".cc:" not in fourth.output, fourth.output
        assert actors() == of_strangers
        assert run("down", *address).stdout == "no fleet runs on this Ray cluster\n"
        assert actors() == of_strangers
    finally:
        ray.shutdown()


def test_actors_of_a_killed_controller_are_named_and_ended_by_down(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    address = ("--ray-address", cluster.address)
    up = (
        *("up", str(tiny_model), "--port", str(free_port()), "--token-file", str(tmp_path / "token"), *address),
        *("--controller-port", str(free_port()), "--dtype", "float32"),
    )
    began = run(*up)
    assert began.returncode == 0, began.stderr
    ray.init(address=cluster.address, namespace="somebody", log_to_driver=False)
    try:
        ray.kill(ray.get_actor("lorafleet-controller", "lorafleet"))
        refused = run(*up)
        assert refused.returncode == 1
        assert "2 actors of a fleet whose controller is gone" in refused.stderr and "`lorafleet down`" in refused.stderr
        assert len(actors()) == 2, "they are left alone"
        assert run("down", *address).stdout == "ended 2 actors\n"
        assert actors() == set()
    finally:
        ray.shutdown()
