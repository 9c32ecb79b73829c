"""``python -m lorafleet.controller.fleet.watchdog SECONDS``: kills its parent when it gives no sign of life on stdin.

It is needed because Ray restarts an actor that has exited, but does not notice one that hangs or is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

from lorafleet.controller.heartbeat import BEAT_S, Pulse, beat

SILENT_S = 15.0  # the same as for workers
_LOOK_S = 0.5


def watch(silent_s: float, parent: int) -> None:
    """Kill the parent when it has been silent for too long. Return when it has ended."""
    pulse = Pulse(sys.stdin.fileno(), time.monotonic())
    while os.getppid() == parent:
        if pulse.look(time.monotonic()) > silent_s:
            os.kill(parent, signal.SIGKILL)
            return
        time.sleep(_LOOK_S)


async def under_watch(silent_s: float = SILENT_S) -> None:
    """Have this process killed when its event loop stops turning for `silent_s`. Runs until it is cancelled."""
    command = [sys.executable, "-m", "lorafleet.controller.fleet.watchdog", str(silent_s), str(os.getpid())]
    while True:
        with contextlib.suppress(OSError), _start(command) as process:  # OSError: no process can be started now
            assert process.stdin is not None
            try:
                while process.poll() is None:  # a watchdog that was killed is replaced
                    beat(process.stdin.fileno())
                    await asyncio.sleep(BEAT_S)
            finally:
                process.kill()
        await asyncio.sleep(BEAT_S)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # It holds none of our pipes open, so readers of our output see when we end.
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing, start_new_session=True)


if __name__ == "__main__":
    watch(float(sys.argv[1]), int(sys.argv[2]))
