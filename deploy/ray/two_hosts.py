"""Runs `ray up` on two hosts made of this machine's namespaces, each with its own sshd, network and processes.

    sudo .venv/bin/python deploy/ray/two_hosts.py [--fault-tolerance]

It uses onprem.yaml with other addresses, login and set-up: both hosts use the environment that runs this script. It
checks that the fleet starts with no further step, with a worker of three ranks over both hosts; that a stream resumes
with the same text when a host is killed and restarted, and when its link is cut; that a killed head, or its store,
restarts by itself; that `ray down` leaves nothing. With --fault-tolerance (node.env) it checks that workers on the
other host keep serving while the head is killed and restarts. Takes some minutes. If it cannot run, it exits with code
77 and a reason: it needs root, network namespaces, sshd, rsync and cron.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
BRIDGE, GATEWAY_ADDRESS = "lorafleet0", "10.77.0.254"
SKIPPED = 77
QUESTION = "Table: cars(id, brand, price)\nQuestion: Which cars cost more than 9000 price?"

SSHD = """
Port 22
HostKey {home}/host_key
AuthorizedKeysFile {home}/.ssh/authorized_keys
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""

# The first process of a host; all others end with it. The home directory outlives it, like a disk.
BOOT = """
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd {home}/crontabs
sed 's#^root:\\(.*\\):/root:#root:\\1:{home}:#' /etc/passwd > /run/passwd
mount --bind /run/passwd /etc/passwd
printf '127.0.0.1 localhost\n10.77.0.1 fleet-h1\n10.77.0.2 fleet-h2\n' > /run/hosts
mount --bind /run/hosts /etc/hosts
mount --bind {home}/crontabs /var/spool/cron/crontabs
hostname {name}
cron
exec /usr/sbin/sshd -D -e -f {home}/sshd_config
"""


class Host:
    """One host. `boot` and `kill` are its power switch, `plug` and `unplug` its cable."""

    def __init__(self, name: str, address: str, disks: Path) -> None:
        self.name, self.address, self.home = name, address, disks / name
        self._process: subprocess.Popen[bytes] | None = None

    def make(self, public_key: str) -> None:
        (self.home / ".ssh").mkdir(parents=True)
        (self.home / ".ssh" / "authorized_keys").write_text(public_key)
        shutil.copy("/etc/skel/.bashrc", self.home / ".bashrc")
        (self.home / ".profile").write_text(". ~/.bashrc\n")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.home / "host_key"))
        (self.home / "sshd_config").write_text(SSHD.format(home=self.home))
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", f"{self.name}-out", "type", "veth", "peer", "name", "eth0", "netns", self.name)
        run("ip", "link", "set", f"{self.name}-out", "master", BRIDGE, "up")
        for command in (
            "link set lo up",
            f"addr add {self.address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {GATEWAY_ADDRESS}",
        ):
            run("ip", "-n", self.name, *command.split())

    def boot(self) -> None:
        script = BOOT.format(home=self.home, name=self.name)
        unshare = ["unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child"]
        log = (self.home / "sshd.log").open("ab")
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *unshare, "bash", "-c", script],
            stdout=log,
            stderr=log,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home)},
        )
        log.close()

    def kill(self) -> None:
        """Kill all its processes at once, like a power failure."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def unplug(self) -> None:
        run("ip", "link", "set", f"{self.name}-out", "down")

    def plug(self) -> None:
        run("ip", "link", "set", f"{self.name}-out", "up")

    def remove(self) -> None:
        self.kill()
        for command in (f"link del {self.name}-out", f"netns del {self.name}"):
            subprocess.run(["ip", *command.split()], check=False, capture_output=True)

    def processes(self, name: str) -> dict[str, str]:
        """Return command lines by pid of the processes with `name` in theirs."""
        found = {}
        for pid in run("ip", "netns", "pids", self.name).split():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if name in command:
                    found[pid] = command
        return found


def run(*command: str, timeout_s: float = 600.0, **variables: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env=os.environ | variables
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def why_not() -> str | None:
    """Return why this cannot run here, or None."""
    if os.geteuid() != 0:
        return "it needs root"
    for program in ("/usr/sbin/sshd", "/usr/sbin/cron", "/usr/bin/rsync", "/usr/bin/ssh", "/usr/bin/unshare"):
        if not Path(program).exists():
            return f"there is no {program}; apt-get install openssh-server openssh-client rsync cron util-linux"
    if not shutil.which("ip"):
        return "there is no ip; apt-get install iproute2"
    if subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], check=False).returncode:
        return "namespaces cannot be made here"
    if REPOSITORY.is_relative_to("/tmp") or REPOSITORY.is_relative_to("/run"):
        return f"{REPOSITORY} lies where each host has a directory of its own; clone it elsewhere"
    return None


def cluster_yaml(disks: Path, hosts: tuple[Host, Host], flags: str, *, fault_tolerant: bool = False) -> str:
    """Write onprem.yaml for these hosts, with further flags for the fleet."""
    config = yaml.safe_load((REPOSITORY / "deploy/ray/onprem.yaml").read_text())
    config["provider"] |= {"head_ip": hosts[0].address, "worker_ips": [hosts[1].address]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(disks / "key")}
    ours = disks / "ray"
    shutil.copytree(REPOSITORY / "deploy/ray", ours)
    with (ours / "fleet.flags").open("a") as file:
        file.write(f"--dtype float32 --worker-wait-s 300 {flags}\n")
    if fault_tolerant:
        settings = (ours / "node.env").read_text()
        for setting in ("#export RAY_gcs_storage=rocksdb", "#export RAY_gcs_rpc_server_reconnect_timeout_s"):
            assert setting in settings
            settings = settings.replace(setting, setting[1:])
        (ours / "node.env").write_text(settings)
    mounts = config["file_mounts"]
    del mounts["~/lorafleet/dist"]
    mounts |= {"~/lorafleet/ray": str(ours), "~/.ray/auth_token": str(disks / "auth_token")}
    mounts |= {name: str(REPOSITORY / path) for name, path in mounts.items() if not path.startswith("/")}
    model = run(str(BIN / "python"), str(REPOSITORY / "examples/demo_model.py")).strip()
    bashrc, link_model = config["setup_commands"][2], f"ln -sfn {model} ~/lorafleet/model"
    assert "bashrc" in bashrc
    config["setup_commands"] = [f"ln -sfn {BIN.parent} ~/lorafleet/venv", bashrc, link_model]
    path = disks / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 300.0) -> float:
    """Wait until it is true. Return how long it took, in seconds."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise SystemExit(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.5)
    return time.monotonic() - began


def ask(url: str, timeout_s: float, max_tokens: int = 40, *, ignore_eos: bool = False) -> str:
    """Stream the sql adapter's answer."""
    body = {
        "model": "sql",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": ignore_eos,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    text = ""
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise SystemExit(f"a stream ended with {event['error']}")
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    return text


def num_ready(url: str) -> int:
    """Return the number of workers a gateway gives requests to; 0 if it does not answer."""
    try:
        with urllib.request.urlopen(f"{url}/fleet", timeout=2) as response:
            return sum(worker["state"] == "ready" for worker in json.load(response)["workers"])
    except (urllib.error.URLError, OSError):
        return 0


class Stream:
    """A long answer, read in the background."""

    def __init__(self, url: str) -> None:
        self.text = ""
        self._thread = threading.Thread(target=self._read, args=(url,))
        self._thread.start()

    def _read(self, url: str) -> None:
        self.text = ask(url, 400.0, 200, ignore_eos=True)

    def end(self) -> str:
        self._thread.join()
        return self.text


def ray_up(config: str, hosts: tuple[Host, Host], url: str, num_workers: int) -> None:
    for host in hosts:
        host.boot()
    time.sleep(2)
    began = time.monotonic()
    run(str(BIN / "ray"), "up", "--yes", "--no-config-cache", config)
    say(f"`ray up` ended after {time.monotonic() - began:.0f} s")
    wait_until(lambda: num_ready(url) == num_workers, "the fleet serves")
    say(f"the fleet serves {time.monotonic() - began:.0f} s after `ray up` began, with no further step")
    print(run(str(BIN / "lorafleet"), "status", "--url", url))


def ray_down(config: str, hosts: tuple[Host, Host]) -> None:
    run(str(BIN / "ray"), "down", "--yes", config)
    for host in hosts:
        wait_until(lambda host=host: not host.processes("ray") and not host.processes("node.sh"), "all is gone", 60.0)
    say("`ray down` left nothing running")


def show(hosts: tuple[Host, Host], disks: Path) -> None:
    """Run a worker over both hosts; let a host, its link and the head fail."""
    head, other = hosts
    config = cluster_yaml(disks, hosts, "--tensor-parallel-size 3")
    url = f"http://{head.address}:8000"
    ray_up(config, hosts, url, 1)
    actors = ("ray::WorkerActor", "ray::FollowerActor")
    ranks = {host.name: sum(len(host.processes(actor)) for actor in actors) for host in hosts}
    say(f"ranks of the worker: {ranks}")
    assert sum(ranks.values()) == 3 and all(ranks.values()), ranks
    answer = ask(url, 60.0)
    say(f"sql answers: {answer}")
    assert answer.startswith("SELECT * FROM cars WHERE price > 9000"), answer
    undisturbed = Stream(url).end()

    stream = Stream(url)
    time.sleep(2)
    say(f"{other.name} is killed, all processes at once, and booted again")
    other.kill()
    began = time.monotonic()
    time.sleep(2)
    other.boot()
    assert stream.end() == undisturbed, (stream.text, undisturbed)
    say(f"the stream went on with the same text, and ended {time.monotonic() - began:.0f} s after the kill")

    stream = Stream(url)
    time.sleep(2)
    say(f"the link of {other.name} is cut for 20 s")
    other.unplug()
    began = time.monotonic()
    time.sleep(20)
    other.plug()
    assert stream.end() == undisturbed, (stream.text, undisturbed)
    say(f"the stream went on with the same text, and ended {time.monotonic() - began:.0f} s after the cut")

    say("Ray's store on the head is killed")
    began = time.monotonic()
    for pid in head.processes("gcs_server"):
        os.kill(int(pid), signal.SIGKILL)
    wait_until(lambda: not num_ready(url), "it is noticed")
    wait_until(lambda: num_ready(url) == 1 and ask(url, 300.0) == answer, "the fleet serves again")
    say(f"the fleet serves again {time.monotonic() - began:.0f} s after the kill")

    say(f"{head.name}, the head, is killed and booted again")
    head.kill()
    began = time.monotonic()
    head.boot()
    wait_until(lambda: num_ready(url) == 1 and ask(url, 300.0) == answer, "the fleet serves again")
    say(f"the fleet serves again {time.monotonic() - began:.0f} s after the kill")
    ray_down(config, hosts)


def show_fault_tolerance(hosts: tuple[Host, Host], disks: Path) -> None:
    """Run a worker and a gateway on each host; the head fails, and the other host keeps serving."""
    head, other = hosts
    config = cluster_yaml(disks, hosts, "--num-workers 2 --gateways all", fault_tolerant=True)
    url = f"http://{other.address}:8000"
    ray_up(config, hosts, f"http://{head.address}:8000", 2)
    wait_until(lambda: num_ready(url) == 2, "the other host's gateway serves")
    undisturbed = Stream(url).end()
    before = set(other.processes("ray::WorkerActor"))

    stream = Stream(url)
    time.sleep(1)
    say(f"{head.name}, the head, is killed")
    head.kill()
    assert stream.end() == undisturbed, (stream.text, undisturbed)
    assert Stream(url).end() == undisturbed
    say("the stream went on with the same text, and another one was answered without a head")
    head.boot()
    began = time.monotonic()
    stream = Stream(url)
    wait_until(lambda: num_ready(url) == 2, "both workers serve again")
    say(f"both workers serve {time.monotonic() - began:.0f} s after the head was booted")
    assert stream.end() == undisturbed, (stream.text, undisturbed)
    assert before <= set(other.processes("ray::WorkerActor")), "the other host's worker went on"
    say(f"the worker of {other.name} is the process that it was")
    ray_down(config, hosts)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fault-tolerance", action="store_true", help="show that instead")
    scenario = show_fault_tolerance if parser.parse_args().fault_tolerance else show
    reason = why_not()
    if reason is not None:
        print(f"skipped: {reason}")
        sys.exit(SKIPPED)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    disks = Path(tempfile.mkdtemp(prefix="lorafleet-hosts-", dir="/var/tmp"))
    hosts = Host("fleet-h1", "10.77.0.1", disks), Host("fleet-h2", "10.77.0.2", disks)
    try:
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(disks / "key"))
        (disks / "auth_token").write_text(os.urandom(32).hex())
        (disks / "auth_token").chmod(0o600)
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{GATEWAY_ADDRESS}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for host in hosts:
            host.make((disks / "key.pub").read_text())
        scenario(hosts, disks)
    finally:
        for host in hosts:
            host.remove()
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)
        if sys.exc_info()[0] is None:
            shutil.rmtree(disks)
        else:
            print(f"logs are left in {disks}", file=sys.stderr)


if __name__ == "__main__":
    main()
