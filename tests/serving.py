"""Real servers, started like a user would, on free ports, and stopped again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
ADAPTERS = ("sql", "pirate", "json")
START_TIMEOUT_S = 180.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(eq=False)
class Endpoint:
    """A gateway on this machine."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, timeout_s: float = 10.0) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout_s) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def series(self, name: str) -> list[float]:
        """Return a metric's values, one per set of labels, in the gateway that answers."""
        lines = self.get("/metrics")[1].splitlines()
        return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]

    def metric(self, name: str) -> float:
        """Return the sum of a metric's series."""
        values = self.series(name)
        assert values, f"no metric {name}"
        return sum(values)

    def complete(self, model: str, prompts: list[str]) -> list[str]:
        """Return twelve greedy tokens after each prompt, all in one request."""
        body = {"model": model, "prompt": prompts, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        return [choice["text"] for choice in self._choices("/v1/completions", body)]

    def chat(self, model: str, prompt: str) -> str:
        """The greedy answer to one message."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 128}
        return str(self._choices("/v1/chat/completions", body)[0]["message"]["content"])

    def _choices(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return list(json.load(response)["choices"])


@dataclass(eq=False)
class Server(Endpoint):
    """One `lorafleet serve` and what it printed."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    _seen: set[tuple[int, str | None]] = field(default_factory=set)  # (pid, when it started)

    def __post_init__(self) -> None:
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._read, self._watch)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            self.lines.extend(stream)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.output
            if any("Ctrl-C stops" in line for line in self.lines):
                return
            time.sleep(0.1)
        raise AssertionError(f"not ready in time:\n{self.output}")

    def processes(self, name: bytes) -> set[int]:
        """Return pids of descendants with a name in their command line."""
        pids = set()
        for pid in self.children():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if name in command:
                pids.add(pid)
        return pids

    def children(self) -> set[int]:
        """Return pids of all descendants."""
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = entry.read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
        found: set[int] = set()
        queue = [self.process.pid]
        while queue:
            for child in parents.get(queue.pop(), []):
                found.add(child)
                queue.append(child)
        self._seen |= {(pid, _started(pid)) for pid in found}
        return found

    def survivors(self) -> set[int]:
        """Return the descendants seen so far that still run."""
        return {pid for pid, started in self._seen if started is not None and _started(pid) == started}

    def _watch(self) -> None:
        while self.process.poll() is None:
            self.children()
            time.sleep(0.2)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """End it like a user or an orchestrator would. Return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            for thread in self._threads:
                thread.join()


def _started(pid: int) -> str | None:
    """Return when a process began, in clock ticks; None if there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def start(*arguments: str, port: int | None = None, environment: dict[str, str] | None = None) -> Server:
    """Start `lorafleet serve`; the caller waits for it and stops it."""
    port = port or free_port()
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "lorafleet"), "serve", *arguments, "--port", str(port)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | (environment or {}),
        start_new_session=True,
    )
    return Server(port, process)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Poll until `condition()` is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.1)
