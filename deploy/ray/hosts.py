"""node.sh's queries to the cluster, and on the head to the configuration that `ray up` leaves there.

python hosts.py wait SECONDS    wait until all hosts that `ray up` starts have joined, or so long
python hosts.py others          print user, key and address of each other host, if the hosts are our own
python hosts.py member          exit code 0 if this host is a member of the cluster
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import yaml

CONFIG = Path("~/ray_bootstrap_config.yaml").expanduser()


def others(config: dict[str, Any]) -> list[str]:
    """Return the other hosts. Hosts of a cloud have no addresses here: their provider ends them."""
    user, key = config["auth"]["ssh_user"], Path(config["auth"].get("ssh_private_key", "")).expanduser()
    return [f"{user} {key} {address}" for address in config["provider"].get("worker_ips", ())]


def num_hosts(config: dict[str, Any]) -> int:
    """Return the number of hosts, including the head."""
    return 1 + sum(kind.get("min_workers", 0) for kind in config["available_node_types"].values())


def wait(config: dict[str, Any], timeout_s: float) -> None:
    """Wait for the other hosts: a head with room for all workers would otherwise get them all."""
    import ray

    deadline = time.monotonic() + timeout_s
    while not ray.is_initialized():
        try:
            ray.init(address="auto", logging_level="error", log_to_driver=False)
        except ConnectionError:  # Ray has not written its address yet
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)
    while sum(node["Alive"] for node in ray.nodes()) < num_hosts(config) and time.monotonic() < deadline:
        time.sleep(1.0)


def is_member() -> bool:
    import ray

    ray.init(address="auto", logging_level="error", log_to_driver=False)
    node_id = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def main() -> None:
    # Without the file, node.sh was started by hand.
    config = yaml.safe_load(CONFIG.read_text()) if CONFIG.exists() else None
    match sys.argv[1:]:
        case ["wait", seconds]:
            if config is not None:
                wait(config, float(seconds))
        case ["others"]:
            if config is not None:
                print(*others(config), sep="\n")
        case ["member"]:
            sys.exit(not is_member())
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
