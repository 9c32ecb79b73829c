"""The gateway processes that `serve` runs: started together on one port, replaced when one dies, ended together.

Owns: their command lines, their lives. Leaves to others: when the fleet is ready and when it ends (launch.py).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from lorafleet.controller.config import ServeConfig
from lorafleet.controller.gateway.api_keys import as_environment
from lorafleet.workers.errors import ConfigError

_REPLACE_S = 1.0  # between the starts of one that keeps ending


class GatewayProcesses:
    """A context, with whose end they are gone. Each has a session of its own, so that Ctrl-C in a terminal reaches it
    through us only."""

    def __init__(self, config: ServeConfig, controller: str, token_file: Path, state_dir: Path) -> None:
        """controller: host:port. state_dir: for what they print."""
        self._command = [sys.executable, "-m", "lorafleet.controller.gateway"]
        self._command += ["--controller", controller, "--token-file", str(token_file), "--exit-with-parent"]
        self._command += ["--host", config.host, "--port", str(config.port)]
        self._command += ["--drain-timeout-s", str(config.drain_timeout_s), "--log-level", config.log_level]
        self._command += ["--worker-wait-s", str(config.worker_wait_s), "--slow-step-s", str(config.hung_step_s / 3)]
        if config.gateway_processes > 1:
            self._command += ["--reuse-port"]
        if config.tenants_file is not None:
            self._command += ["--tenants", config.tenants_file]
        if config.seed is not None:
            self._command += ["--seed", str(config.seed)]
        self._command += config.limits.as_flags()
        self._environment = as_environment(config.api_keys, config.admin_api_keys)
        self._printed = [state_dir / f"gateway-{number}" for number in range(config.gateway_processes)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._started_at: list[float] = []

    def __enter__(self) -> GatewayProcesses:
        for printed in self._printed:
            self._processes.append(self._start(printed))
            self._started_at.append(time.monotonic())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            _reap(process)

    def check(self) -> None:
        """Raises `ConfigError` when one has ended: while the fleet starts, that has a reason that would come again."""
        for process in self._processes:
            if process.poll() is not None:
                raise ConfigError(
                    f"The gateway ended by itself with exit code {process.returncode}; see its log above."
                )

    @property
    def are_listening(self) -> bool:
        """All have said that they do. One of several does so only when it can serve."""
        return all(printed.stat().st_size for printed in self._printed)

    def replace_ended(self) -> list[int]:
        """Start those anew that have ended; the exit codes of these."""
        codes = []
        for number, process in enumerate(self._processes):
            if process.poll() is None or time.monotonic() - self._started_at[number] < _REPLACE_S:
                continue
            codes.append(process.returncode)
            _reap(process)
            self._processes[number] = self._start(self._printed[number])
            self._started_at[number] = time.monotonic()
        return codes

    def terminate(self) -> None:
        """Let them drain."""
        for process in self._processes:
            process.terminate()

    @property
    def have_ended(self) -> bool:
        return all(process.poll() is not None for process in self._processes)

    def _start(self, printed: Path) -> subprocess.Popen[bytes]:
        with printed.open("wb") as output:
            return subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=output, env=self._environment, start_new_session=True
            )


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
