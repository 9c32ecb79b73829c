"""Gateway processes that die or hang, with processes in their place; and the command lines of real ones."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorafleet.controller.commands.command_table import make_parser
from lorafleet.controller.commands.flags import serve_config
from lorafleet.controller.config import ServeConfig
from lorafleet.controller.fleet import gateway_processes as module
from lorafleet.controller.fleet.gateway_processes import GatewayProcess, GatewayProcesses
from lorafleet.controller.gateway.__main__ import parse
from lorafleet.controller.gateway.api.auth import ApiKeys
from lorafleet.controller.gateway.api_keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from lorafleet.controller.gateway.config import GatewayConfig
from lorafleet.controller.gateway.limits import Limits
from lorafleet.controller.gateway.tenants import tenants_of
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.errors import AuthenticationError, ConfigError

# Gives signs of life ten times a second; it exits when its stdin is closed, and with 7 on command.
GATEWAY = """
import signal, sys, threading, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
def beat():
    while True:
        print(flush=True)
        time.sleep(0.1)
threading.Thread(target=beat, daemon=True).start()
print("lorafleet gateway listening on nothing", flush=True)
while sys.stdin.read(1):
    pass
"""


@pytest.fixture
def gateways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GatewayProcesses]:
    monkeypatch.setattr(module, "REPLACE_S", 0.0)
    monkeypatch.setattr(module, "SILENT_S", 1.0)
    config = ServeConfig(EngineConfig("/model"), ("base",), gateway_processes=2)
    gateways = GatewayProcesses(config, "127.0.0.1:1", tmp_path / "token")
    gateways._command = [sys.executable, "-c", GATEWAY]
    with gateways:
        until(lambda: gateways.are_listening)
        yield gateways


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pids(gateways: GatewayProcesses) -> list[int]:
    return [process._process.pid for process in gateways._processes]


def replaced(gateways: GatewayProcesses) -> list[str]:
    """Return the lines about the processes replaced next."""
    said: list[str] = []

    def replace() -> list[str]:
        said.extend(gateways.replace_lost())
        return said

    until(replace)
    return said


def test_a_stopped_one_is_ended_and_replaced_and_the_others_stay(gateways: GatewayProcesses) -> None:
    first, second = pids(gateways)
    os.kill(first, signal.SIGSTOP)
    (said,) = replaced(gateways)
    assert said.startswith("a gateway has given no sign of life for ") and said.endswith(
        " and is ended; another takes its place"
    )
    assert first not in pids(gateways) and pids(gateways)[1] == second
    assert not Path(f"/proc/{first}").exists()
    until(lambda: gateways.are_listening)
    assert gateways.replace_lost() == []


def test_one_that_dies_is_replaced(gateways: GatewayProcesses) -> None:
    first, second = pids(gateways)
    os.kill(second, signal.SIGKILL)
    assert replaced(gateways) == ["a gateway ended with exit code -9; another takes its place"]
    assert pids(gateways)[0] == first
    until(lambda: gateways.are_listening)


def test_one_that_cannot_be_replaced_now_is_replaced_later(
    gateways: GatewayProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> GatewayProcess:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    first, second = pids(gateways)
    os.kill(second, signal.SIGKILL)
    with monkeypatch.context() as crowded:
        crowded.setattr(gateways, "_start", fail)
        (said,) = replaced(gateways)
        assert said.endswith("another cannot be started now: Resource temporarily unavailable")
        assert not gateways.are_listening and pids(gateways) == [first, second]
    (said,) = replaced(gateways)
    assert said.endswith("another takes its place")
    until(lambda: gateways.are_listening)


def test_while_the_fleet_starts_one_that_ends_is_a_refusal(gateways: GatewayProcesses) -> None:
    gateways.check()
    gateways.terminate()
    until(lambda: gateways.have_ended)
    with pytest.raises(ConfigError, match="exit code 7"):
        gateways.check()


def test_closing_ends_stopped_ones_too(tmp_path: Path) -> None:
    gateways = GatewayProcesses(ServeConfig(EngineConfig("/model"), ("base",)), "127.0.0.1:1", tmp_path / "token")
    gateways._command = [sys.executable, "-c", GATEWAY]
    with gateways:
        (pid,) = pids(gateways)
        os.kill(pid, signal.SIGSTOP)
    assert not Path(f"/proc/{pid}").exists()


def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, command: str = "serve") -> GatewayConfig:
    """Return the settings a gateway gets from `lorafleet serve` with these flags."""
    token_file = tmp_path / "token"
    token_file.write_text("fleet-token")
    config = serve_config(make_parser().parse_args([command, "org/base", *flags]))
    processes = GatewayProcesses(config, "127.0.0.1:1", token_file)
    for name in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
        if name in processes._environment:
            monkeypatch.setenv(name, processes._environment[name])
    return parse(processes._command[3:])[0]


@pytest.mark.parametrize("command", ["serve", "up"])
def test_bounds_reach_each_gateway_as_they_were_given(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(tmp_path, monkeypatch, command=command).limits == Limits()
    flags = (
        "--max-body-bytes",
        "1MiB",
        "--max-in-flight",
        "100",
        "--header-timeout-s",
        "2.5",
        "--max-connections",
        "9",
    )
    limits = told(tmp_path, monkeypatch, *flags, command=command).limits
    assert limits == Limits(max_body_bytes=1 << 20, max_in_flight=100, header_timeout_s=2.5, max_connections=9)


def test_a_key_with_a_comma_is_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = told(tmp_path, monkeypatch, "--api-key", "x,9f2c71d8e0b44a", "--admin-api-key", "root,key")
    assert (config.api_keys, config.admin_api_keys) == (("x,9f2c71d8e0b44a",), ("root,key",))
    keys = ApiKeys(tenants_of(config.api_keys, {}))
    keys.check("Bearer x,9f2c71d8e0b44a")
    for part in ("x", "9f2c71d8e0b44a", "x,", ""):
        with pytest.raises(AuthenticationError):
            keys.check(f"Bearer {part}")


def test_keys_of_the_environment_are_not_those_of_a_server_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "one,two")
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, "root")
    config = told(tmp_path, monkeypatch)
    assert (config.api_keys, config.admin_api_keys) == (("one", "two"), ("root",))
    monkeypatch.delenv(API_KEY_VARIABLE)
    monkeypatch.delenv(ADMIN_KEY_VARIABLE)
    assert told(tmp_path, monkeypatch).api_keys == ()
