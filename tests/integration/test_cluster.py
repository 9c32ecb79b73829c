"""A fleet on a Ray cluster of three raylets that act as nodes: up, status, more gateways, a lost node, down."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from serving import Endpoint, free_port, wait_until

LORAFLEET = str(Path(sys.executable).parent / "lorafleet")
PROMPTS = ["the quick", "over the lazy dog", "then"]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Start a head without CPUs and two nodes with one each, so that a worker of two ranks needs both."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LORAFLEET, *arguments], capture_output=True, text=True, timeout=180, check=False, env=os.environ | variables
    )


def drain(address: str, node_id: str) -> str:
    """Drain any node like `lorafleet drain` does, though all nodes are this machine."""
    ray.init(address=address, namespace="lorafleet", log_to_driver=False)
    try:
        outcome = ray.get(ray.get_actor("lorafleet-controller").drain_node.remote(node_id, 30.0), timeout=60)
        assert outcome.succeeded
        return str(outcome.text)
    finally:
        ray.shutdown()


def answers(server: Endpoint, model: str) -> list[str] | None:
    try:
        return server.complete(model, PROMPTS)
    except (urllib.error.URLError, OSError):
        return None


def test_a_worker_over_two_nodes_outlives_the_command_and_a_node(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    port, worker_port, token_file = free_port(), free_port(), tmp_path / "secrets" / "token"
    address = ("--ray-address", cluster.address)
    up = [
        *("up", str(tiny_model), "--served-model-name", "tiny", "--dtype", "float32", "--tensor-parallel-size", "2"),
        *("--enable-lora", "--lora-modules", f"good={tiny_model.parent / 'good'}"),
        *("--port", str(port), "--controller-port", str(free_port()), "--token-file", str(token_file), *address),
        *("--worker-ports", f"{worker_port}-{worker_port}"),
    ]
    too_many = run(*up, "--num-workers", "2")
    assert too_many.returncode == 1, too_many.stderr
    assert "--num-workers 2 of --tensor-parallel-size 2 need 4 CPUs" in too_many.stderr
    lost = cluster.list_all_nodes()[-1]
    assert lost is not cluster.head_node
    cluster.remove_node(lost)
    follower = subprocess.Popen(
        [LORAFLEET, *up, "--follow"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert follower.stderr is not None
    while "waiting for nodes: --num-workers 1 of" not in (line := follower.stderr.readline()):
        assert line, "it has ended"
    cluster.add_node(num_cpus=1)
    server, second = Endpoint(port), Endpoint(free_port())
    wait_until(lambda: answers(server, "tiny") is not None, "it has found room", timeout_s=120)
    began = run(*up)
    assert began.returncode == 0, began.stderr
    assert token_file.stat().st_mode & 0o777 == 0o600
    (line,) = [line for line in began.stdout.splitlines() if line.startswith("more gateways: ")]
    again = run(*up)
    assert (again.returncode, again.stdout) == (0, began.stdout), again.stderr
    other = run(*up, "--max-loras", "3")
    assert other.returncode == 1
    assert "other flags" in other.stderr

    command = [LORAFLEET, *line.split()[3:], "--port", str(second.port)]
    gateway = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        expected = {model: server.complete(model, PROMPTS) for model in ("tiny", "good")}
        assert expected["tiny"] != expected["good"]
        wait_until(lambda: answers(second, "good") == expected["good"], "the second gateway answers")
        status = run("status", "--url", second.url).stdout.splitlines()
        assert status[1].split()[:3] == ["lorafleet-worker-0", "ready", "2"]
        socket.create_connection((cluster.address.split(":")[0], worker_port), timeout=5).close()

        outcomes = {node: drain(cluster.address, node.node_id) for node in cluster.list_all_nodes()}
        assert outcomes.pop(cluster.head_node) == "no worker is on this node"
        assert set(outcomes.values()) == {"drained: lorafleet-worker-0"}, "it has a rank on each of the others"
        assert run("drain", *address).returncode == 0
        wait_until(lambda: "draining" in run("status", "--url", second.url).stdout, "it refuses requests")
        restarted = run("restart", *address)
        assert (restarted.returncode, restarted.stdout) == (0, "all 1 workers were restarted\n"), restarted.stderr
        wait_until(lambda: answers(server, "good") == expected["good"], "the head's gateway is back")

        lost = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
        cluster.remove_node(lost, allow_graceful=False)
        wait_until(lambda: not second.series("lorafleet_worker_ready"), "the worker is lost", timeout_s=60)
        cluster.add_node(num_cpus=1)
        wait_until(lambda: answers(server, "good") == expected["good"], "a new one serves", timeout_s=180)
        assert answers(second, "tiny") == expected["tiny"]
    finally:
        gateway.terminate()
        assert gateway.wait(60) == 0
        ended = run("down", *address)
        followed = follower.communicate(timeout=60)[1]
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("ended ")
    assert follower.returncode == 0, followed
    assert "lorafleet-worker-0 is drained" in followed and followed.endswith("the fleet was ended\n")
    assert answers(server, "tiny") is None
    assert run("down", *address).stdout == "no fleet runs on this Ray cluster\n"


def test_without_a_cluster_the_command_says_so() -> None:
    done = run("down", "--ray-address", "127.0.0.1:1")
    assert done.returncode == 1
    assert "No Ray cluster can be joined at '127.0.0.1:1'" in done.stderr
    assert "Traceback" not in done.stderr
