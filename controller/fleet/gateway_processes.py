"""The gateway processes of a node: started together on one port, replaced when one dies or hangs, ended together.

Owns: their command lines, their lives. Leaves to others: when the fleet is ready and when it ends (commands/serve.py).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from lorafleet.controller.arguments.flags import command_line
from lorafleet.controller.config import ServeConfig
from lorafleet.controller.gateway.api_keys import as_environment
from lorafleet.controller.gateway.options import GatewayOptions
from lorafleet.controller.heartbeat import Pulse
from lorafleet.workers.errors import ConfigError

REPLACE_S = 1.0  # between the starts of a gateway that keeps exiting
SILENT_S = 10.0  # without a sign of life; short, since the kernel still gives a hung one its share of new connections
START_S = 60.0  # the same before its first sign of life


class GatewayProcess:
    """One gateway process, in a session of its own, so that Ctrl-C in a terminal reaches it through us only."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert self._process.stdout is not None
        self._pulse = Pulse(self._process.stdout.fileno(), time.monotonic())
        self.started_at = time.monotonic()  # or when the start of its successor was tried last

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    @property
    def is_listening(self) -> bool:
        """Return whether it has reported that it listens. One of several reports that only once it can serve."""
        if self.exit_code is not None:
            return False
        self._pulse.look(time.monotonic())
        return self._pulse.has_said(b"listening")

    @property
    def silent_s(self) -> float:
        """Return the seconds since its last sign of life; 0 for a process that is still starting."""
        silent_s = self._pulse.look(time.monotonic())
        return silent_s if self._pulse.has_beaten or silent_s > START_S else 0.0

    def terminate(self) -> None:
        self._process.terminate()

    def end(self) -> None:
        """Kill the process, even a stopped one."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class GatewayProcesses:
    """A node's gateways, as a context: they end with it."""

    def __init__(self, config: ServeConfig, controller: str, token_file: Path) -> None:
        """controller: host:port."""
        self._command = [sys.executable, "-m", "lorafleet.controller.gateway"]
        self._command += ["--controller", controller, "--token-file", str(token_file), "--exit-with-parent"]
        self._command += ["--slow-step-s", str(config.hung_step_s / 3), *command_line(config, GatewayOptions)]
        if config.gateway_processes > 1:
            self._command += ["--reuse-port"]
        self._environment = as_environment(config.api_keys, config.admin_api_keys)
        self._number = config.gateway_processes
        self._processes: list[GatewayProcess] = []

    def __enter__(self) -> GatewayProcesses:
        self._processes = [self._start() for _ in range(self._number)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.end()

    def check(self) -> None:
        """Raise `ConfigError` if one has exited: while the fleet starts, the cause would recur."""
        for process in self._processes:
            if process.exit_code is not None:
                raise ConfigError(f"The gateway ended by itself with exit code {process.exit_code}; see its log above.")

    @property
    def are_listening(self) -> bool:
        return all(process.is_listening for process in self._processes)

    def replace_lost(self) -> list[str]:
        """Replace the processes that have exited or hang. Return a line to print for each.

        One that cannot be replaced now, since the machine has no room for a process, is replaced later.
        """
        lost = []
        for number, process in enumerate(self._processes):
            if process.exit_code is None:
                if (silent_s := process.silent_s) <= SILENT_S:
                    continue
                lost.append(f"a gateway has given no sign of life for {silent_s:.0f} s and is ended")
            elif time.monotonic() - process.started_at < REPLACE_S:
                continue
            else:
                lost.append(f"a gateway ended with exit code {process.exit_code}")
            process.end()
            try:
                self._processes[number] = self._start()
                lost[-1] += "; another takes its place"
            except OSError as error:
                process.started_at = time.monotonic()
                lost[-1] += f"; another cannot be started now: {error.strerror}"
        return lost

    def terminate(self) -> None:
        """Let the gateways drain; at the second call, answer and end their requests at once."""
        for process in self._processes:
            process.terminate()

    @property
    def have_ended(self) -> bool:
        return all(process.exit_code is not None for process in self._processes)

    def _start(self) -> GatewayProcess:
        return GatewayProcess(self._command, self._environment)
