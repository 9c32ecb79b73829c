"""Starting and ending a fleet, with Ray replaced and a real gateway process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import ray

from lorafleet.controller.commands import ray_cluster as cluster_module
from lorafleet.controller.commands import serve as launch
from lorafleet.controller.config import ServeConfig
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.errors import ConfigError, LoRAFleetError, MemoryPlanError
from lorafleet.workers.server.actor import WorkerFailed


class FakeCluster:
    """Stands in for `FleetCluster`; the controller's answer is `answer()`."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer
        self.controller_arguments: tuple[Any, ...] = ()
        self.is_shut_down = False
        self.dead: list[str] = []
        self.ailment = ""

    def __call__(self, address: str | None, num_actors: int, while_waiting: Callable[[], None]) -> FakeCluster:
        while_waiting()
        return self

    def dead_processes(self) -> list[str]:
        return self.dead

    def ask_if_it_lives(self) -> Future[str]:
        answer: Future[str] = Future()
        answer.set_result(self.ailment)
        return answer

    def mark_owner(self) -> str:
        return "owner"

    def create_controller(self, actor: type, *args: object, **options: object) -> None:
        self.controller_arguments = args

    def poll(self, method: str, *args: object, timeout_s: float) -> Any:
        return self.answer()

    def shutdown(self) -> None:
        self.is_shut_down = True


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Restore the state of the process that `serve` changes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def gateways(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The gateway processes started."""
    started = []
    popen = subprocess.Popen

    def record(*args: Any, **kwargs: Any) -> Any:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", record)
    return started


def config(port: int, **fields: Any) -> ServeConfig:
    return ServeConfig(EngineConfig("/model"), ("base",), port=port, drain_timeout_s=0.5, **fields)


def use(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], Any]) -> FakeCluster:
    cluster = FakeCluster(answer)
    monkeypatch.setattr(cluster_module, "FleetCluster", cluster)
    return cluster


def test_a_port_in_use_is_refused_before_anything_starts(gateways: list[Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"Cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
            launch.serve(config(taken.getsockname()[1]))
    assert not gateways


def test_a_host_that_is_not_here_is_refused(gateways: list[Any], port: int) -> None:
    with pytest.raises(ConfigError, match="Cannot listen on 192"):
        launch.serve(config(port, host="192.0.2.1"))
    assert not gateways


def test_a_worker_that_cannot_start_ends_everything_with_its_error(
    monkeypatch: pytest.MonkeyPatch, gateways: list[Any], port: int
) -> None:
    cluster = use(monkeypatch, lambda: WorkerFailed("memory_plan", "Lower --max-loras."))
    with pytest.raises(MemoryPlanError, match="Lower --max-loras"):
        launch.serve(config(port))
    assert cluster.is_shut_down
    assert [gateway.poll() is not None for gateway in gateways] == [True]


def test_a_controller_that_dies_ends_everything(
    monkeypatch: pytest.MonkeyPatch, gateways: list[Any], port: int
) -> None:
    def die() -> Any:
        raise RuntimeError("The controller died.")

    cluster = use(monkeypatch, die)
    with pytest.raises(LoRAFleetError, match="The controller died"):
        launch.serve(config(port))
    assert cluster.is_shut_down
    assert [gateway.poll() is not None for gateway in gateways] == [True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_fleet_starts_ends_everything_without_error(
    monkeypatch: pytest.MonkeyPatch, gateways: list[Any], port: int, number: signal.Signals
) -> None:
    def interrupt() -> None:
        signal.raise_signal(number)

    cluster = use(monkeypatch, interrupt)
    launch.serve(config(port))
    assert cluster.is_shut_down
    assert [gateway.poll() is not None for gateway in gateways] == [True]


def test_a_gateway_that_ends_by_itself_ends_everything(
    monkeypatch: pytest.MonkeyPatch, gateways: list[Any], port: int
) -> None:
    def kill_gateway() -> Any:
        gateways[0].kill()
        gateways[0].wait()
        return type("Ready", (), {"workers": ()})()

    cluster = use(monkeypatch, kill_gateway)
    with pytest.raises(LoRAFleetError, match="gateway ended"):
        launch.serve(config(port))
    assert cluster.is_shut_down


def test_keys_are_not_in_the_gateways_command_line_nor_in_the_controllers_arguments(
    monkeypatch: pytest.MonkeyPatch, gateways: list[Any], port: int
) -> None:
    cluster = use(monkeypatch, lambda: WorkerFailed("bad_model", "No."))
    with pytest.raises(LoRAFleetError):
        launch.serve(config(port, api_keys=("secret-key",), tenants_file="/no/such/tenants.json"))
    assert not any("secret-key" in argument for argument in gateways[0].args)
    assert "--tenants=/no/such/tenants.json" in gateways[0].args
    assert cluster.controller_arguments[0].api_keys == ()


def test_waiting_for_ray_goes_on_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our signal handlers are set repeatedly meanwhile, and Ray starts on a lasting thread."""
    threads, waited = [], 0

    def init(**options: Any) -> None:
        threads.append(threading.current_thread())
        time.sleep(0.1)

    def wait() -> None:
        nonlocal waited
        waited += 1

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: threads.append(threading.current_thread()))
    monkeypatch.setattr(ray.util, "list_named_actors", lambda **_: [])
    cluster = cluster_module.FleetCluster(None, 1, while_waiting=wait)
    assert waited > 2
    assert threads[0] is not threading.main_thread() and threads[0].is_alive()
    cluster.shutdown()
    assert threads[1] is threads[0]
    assert not threads[0].is_alive()
