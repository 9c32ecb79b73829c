"""``python -m lorafleet.controller.fleet.watchdog SECONDS``: ends its parent when that gives no sign of life on stdin.

Ray restarts an actor that has ended, and never notices one that hangs or is stopped.
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

SILENT_S = 15.0  # as long as a worker may be silent
_LOOK_S = 0.5


def watch(silent_s: float, parent: int) -> None:
    """Return when the parent has ended, by itself or by us."""
    pulse = Pulse(sys.stdin.fileno(), time.monotonic())
    while os.getppid() == parent:
        if pulse.look(time.monotonic()) > silent_s:
            os.kill(parent, signal.SIGKILL)
            return
        time.sleep(_LOOK_S)


async def under_watch(silent_s: float = SILENT_S) -> None:
    """Have this process ended when its event loop stops turning for so long. Runs until it is cancelled."""
    command = [sys.executable, "-m", "lorafleet.controller.fleet.watchdog", str(silent_s), str(os.getpid())]
    while True:
        with contextlib.suppress(OSError), _start(command) as process:  # OSError: the machine has no process to give
            assert process.stdin is not None
            try:
                while process.poll() is None:  # else somebody has ended it, and another takes its place
                    beat(process.stdin.fileno())
                    await asyncio.sleep(BEAT_S)
            finally:
                process.kill()
        await asyncio.sleep(BEAT_S)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # Nothing of ours is held open by it, so that whoever reads our output sees our end.
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing, start_new_session=True)


if __name__ == "__main__":
    watch(float(sys.argv[1]), int(sys.argv[2]))
