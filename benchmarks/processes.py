"""Trees of processes in /proc: their members, memory and CPU time, and ending them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

Process = tuple[int, str]  # pid and start time, since a pid may be reused


def tree(root: int) -> set[Process]:
    """Return a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [root]
    while queue:
        found.append(queue.pop())
        queue += children.get(found[-1], [])
    return {(pid, fields[19]) for pid in found if (fields := _stat(pid))}


def pss_bytes(root: int) -> int:
    """Return the memory of a tree; a page that n processes share counts 1/n for each."""
    total = 0
    for pid, _ in tree(root):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def cpu_share(roots: Sequence[int], seconds: float = 2.0) -> float:
    """Measure for a while how many cores some trees keep busy."""

    def ticks() -> int:
        pids = (pid for root in roots for pid, _ in tree(root))
        return sum(int(fields[11]) + int(fields[12]) for pid in pids if (fields := _stat(pid)))

    before = ticks()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def kill(processes: set[Process]) -> None:
    """Kill those that still run."""
    for pid, began in processes:
        fields = _stat(pid)
        if fields and fields[19] == began:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    """Return /proc/PID/stat after the command's name: state, parent, ...; empty for no process, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []
    return [] if fields[0] in "ZX" else fields
