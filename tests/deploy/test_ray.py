"""The files of `ray up`: Ray accepts them, the files they name exist, and the fleet's flags are valid.

deploy/ray/two_hosts.py runs them for real, on two hosts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from lorafleet.controller.arguments.flags import made
from lorafleet.controller.commands.command_table import make_parser
from lorafleet.controller.commands.flags import serve_config, with_flags_file
from lorafleet.controller.config import UpOptions

REPOSITORY = Path(__file__).parents[2]
RAY = REPOSITORY / "deploy" / "ray"
MADE_BY_OTHERS = {"dist": "make package", "~/.ray/auth_token": "ray get-auth-token --generate"}
HOME = "~/lorafleet/"  # on a host


def read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((RAY / name).read_text())
    return config


@pytest.fixture(params=["onprem.yaml", "aws.yaml"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)


def commands(config: dict[str, Any]) -> list[str]:
    return [command for name, value in config.items() if name.endswith("_commands") for command in value]


def test_ray_takes_it_and_refuses_a_misspelt_key(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))
    with pytest.raises(jsonschema.ValidationError, match="file_mount"):
        validate_config(prepare_config(config | {"file_mount": {}}))


def test_files_copied_to_the_hosts_exist_or_are_built_by_a_command_that_it_names(config: dict[str, Any]) -> None:
    for path in config["file_mounts"].values():
        if path not in MADE_BY_OTHERS:
            assert (REPOSITORY / path).exists(), path
    text = (RAY / "onprem.yaml").read_text()
    assert all(command in text for command in MADE_BY_OTHERS.values())


def test_its_commands_use_only_files_it_has_copied_or_created(config: dict[str, Any]) -> None:
    mounts = config["file_mounts"]
    for command in commands(config):
        for path in re.findall(r"~/lorafleet/([\w./-]+)", command):
            first = path.split("/")[0]
            if first in ("venv", "model"):
                continue  # a command makes it
            source = REPOSITORY / mounts[HOME + first]
            assert source.name == "dist" or (source / path.partition("/")[2]).exists(), command
    started = [command for command in commands(config) if "node.sh" in command]
    assert [command.split("node.sh ")[1] for command in started] == ["start head", "start worker $RAY_HEAD_IP"]


def test_both_start_the_hosts_in_the_same_way() -> None:
    onprem, aws = read("onprem.yaml"), read("aws.yaml")
    for key in ("file_mounts", "setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert onprem[key] == aws[key]


def test_the_fleets_flags_are_valid() -> None:
    args = make_parser().parse_args(with_flags_file(["up", f"@{RAY / 'fleet.flags'}", "--follow"]))
    config = serve_config(args)
    assert config.engine.model == f"{HOME}model"
    for adapter in config.adapters:
        assert (REPOSITORY / adapter.path.removeprefix(HOME)).is_dir(), adapter
    assert args.gateways != "none" and config.host == "0.0.0.0"


def settings(**variables: str) -> dict[str, str]:
    """Return the variables node.env sets for a host's shells."""
    done = subprocess.run(
        ["bash", "-euc", f". {RAY / 'node.env'}; set -a; RAY_PORT=$RAY_PORT; RAY_PORTS=$RAY_PORTS; env -0"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "HOME": "/home/user"} | variables,
    )
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)


def test_the_cluster_asks_for_a_token_and_its_ports_are_fixed_and_apart() -> None:
    found = settings()
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_AUTH_TOKEN_PATH"] == "/home/user/.ray/auth_token"
    assert found["PATH"].startswith("/home/user/lorafleet/venv/bin:")
    ports = dict(re.findall(r"--([\w-]+)=(\d+)", found["RAY_PORTS"])) | {"port": found["RAY_PORT"]}
    low, high = int(ports.pop("min-worker-port")), int(ports.pop("max-worker-port"))
    fixed = [int(port) for port in ports.values()]
    args = make_parser().parse_args(with_flags_file(["up", f"@{RAY / 'fleet.flags'}"]))
    fixed += [serve_config(args).port, made(UpOptions, args).controller_port]
    ranges = [range(low, high + 1), range(args.worker_ports[0], args.worker_ports[1] + 1)]
    assert len(set(fixed)) == len(fixed)
    assert not any(port in taken for port in fixed for taken in ranges)
    assert not set(ranges[0]) & set(ranges[1])
    known = subprocess.run(
        [str(Path(sys.executable).parent / "ray"), "start", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(f"--{name} " in known for name in ports)


def test_the_head_knows_the_other_hosts(tmp_path: Path) -> None:
    prepared = prepare_config(read("onprem.yaml"))
    prepared["provider"]["worker_ips"] = ["10.0.0.2", "10.0.0.3"]
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(prepared))
    command = [sys.executable, str(RAY / "hosts.py"), "others"]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    said = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    key = tmp_path / ".ssh/id_ed25519"
    assert said == f"ubuntu {key} 10.0.0.2\nubuntu {key} 10.0.0.3\n"
    (tmp_path / "ray_bootstrap_config.yaml").unlink()
    assert subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout == ""
    spec = importlib.util.spec_from_file_location("hosts", RAY / "hosts.py")
    assert spec is not None and spec.loader is not None
    hosts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hosts)
    assert hosts.num_hosts(prepare_config(read("onprem.yaml"))) == 2
    assert hosts.num_hosts(prepare_config(read("aws.yaml"))) == 3
    assert hosts.others(prepare_config(read("aws.yaml"))) == []


def test_node_sh_prints_its_usage_and_refuses_unknown_commands(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        return subprocess.run([RAY / "node.sh", *arguments], capture_output=True, text=True, env=env, check=False)

    usage = run()
    assert usage.returncode == 2 and "node.sh start worker HEAD_IP" in usage.stderr
    assert "which head?" in run("start", "worker").stderr
    assert "start head, or start worker HEAD_IP" in run("start", "boss").stderr
    assert "comes first" in run("run").stderr
    assert not (tmp_path / ".lorafleet").exists(), "nothing was begun"
