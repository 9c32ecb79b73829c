"""The processes compared: servers with HTTP, and children that hold an engine and answer calls.

Each is a context manager that ends all it started, however the block is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks import processes, serving
from benchmarks.workloads import Workload, make_requests

REPOSITORY = Path(__file__).parents[1]
START_TIMEOUT_S = 300.0
RUN_TIMEOUT_S = 600.0
VOCAB_SIZE = 30_000  # prompt token ids are drawn below this


class PeerError(Exception):
    """A peer did not start, ended by itself, or answered with an error."""


class _Peer:
    """A process in its own session, so that Ctrl-C in a terminal reaches it through us only."""

    def __init__(
        self, command: Sequence[str], log: Path, directory: Path, environment: Mapping[str, str], **pipes: Any
    ) -> None:
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                env=os.environ | dict(environment),
                stderr=stream,
                start_new_session=True,
                **{"stdout": stream, **pipes},
            )
        self._seen: set[processes.Process] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.process.pid

    def check(self) -> None:
        """Raise PeerError if it has ended."""
        self._seen |= processes.tree(self.pid)
        if self.process.poll() is not None:
            raise PeerError(f"ended with exit code {self.process.returncode}: {self._last_words()}")

    def stop(self, timeout_s: float = 40.0) -> None:
        """Ask it to end, then kill the rest of it."""
        self._seen |= processes.tree(self.pid)
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        finally:
            processes.kill(self._seen | processes.tree(self.pid))
            self.process.wait()

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it printed nothing"])[-1][-300:]


class Server(_Peer):
    """An OpenAI-compatible server on a free port of 127.0.0.1, which `command` lacks. Waits until it is ready."""

    def __init__(
        self, command: Sequence[str], log: Path, ready_path: str, environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        began = time.perf_counter()
        super().__init__([*command, "--host", "127.0.0.1", "--port", str(port)], log, log.parent, environment or {})
        try:
            while not self._answers(ready_path):
                self.check()
                if time.perf_counter() - began > START_TIMEOUT_S:
                    raise PeerError(f"not ready after {START_TIMEOUT_S:.0f} s: {self._last_words()}")
                time.sleep(0.05)
        except BaseException:
            self.stop(timeout_s=5.0)
            raise
        self.ready_s = time.perf_counter() - began

    def run(self, workload: Workload, seed: int) -> dict[str, Any]:
        """Run a workload once over HTTP. Raises PeerError, or the client's errors."""
        self.check()
        return asyncio.run(asyncio.wait_for(self._run(workload, seed), RUN_TIMEOUT_S))

    async def _run(self, workload: Workload, seed: int) -> dict[str, Any]:
        async with serving.connect(self.url) as session:
            base, adapters = await serving.models(session)
            requests = make_requests(workload, adapters, vocab_size=VOCAB_SIZE, seed=seed)
            return await serving.run(session, workload, requests, base)

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5.0) as response:
                return bool(response.status == 200)
        except OSError:  # refused, reset, or an HTTP status: not ready yet
            return False


class Child(_Peer):
    """A module of this package that answers calls on stdin and stdout, one JSON line each (see child.py)."""

    def __init__(self, module: str, *arguments: str, log: Path) -> None:
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
        super().__init__(command, log, REPOSITORY, {}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, name: str, **arguments: Any) -> Any:
        """Call a function there. Raises PeerError if it fails."""
        self.check()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"name": name, "arguments": arguments}).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(10.0)
            self.check()
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["result"]

    def stop(self, timeout_s: float = 10.0) -> None:
        super().stop(timeout_s)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
