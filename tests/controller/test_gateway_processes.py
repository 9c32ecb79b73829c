"""What gateway processes are told: the same as the command that starts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.controller.cli import make_parser
from lorafleet.controller.fleet_flags import serve_config
from lorafleet.controller.gateway.__main__ import parse
from lorafleet.controller.gateway.api_keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from lorafleet.controller.gateway.auth import ApiKeys
from lorafleet.controller.gateway.config import GatewayConfig
from lorafleet.controller.gateway.limits import Limits
from lorafleet.controller.gateway.tenants import tenants_of
from lorafleet.controller.gateway_processes import GatewayProcesses
from lorafleet.workers.errors import AuthenticationError


def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, command: str = "serve") -> GatewayConfig:
    """What a gateway makes of what `lorafleet serve` with these flags tells it."""
    token_file = tmp_path / "token"
    token_file.write_text("fleet-token")
    config = serve_config(make_parser().parse_args([command, "org/base", *flags]))
    processes = GatewayProcesses(config, "127.0.0.1:1", token_file, tmp_path)
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
