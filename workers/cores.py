"""The cores that a rank computes on: how many it may use, and which it takes so that ranks of one host have others.

A rank may use what its affinity and its container's CPU quota allow, and shares that with the ranks beside it. Which
cores it takes is agreed on through lock files, since ranks of one host may belong to different workers, even to
different fleets, and come and go by themselves: the kernel frees a lock with its process.
"""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
Read = Callable[[Path], str | None]  # a file's text; None where there is none


def num_usable_cores() -> int:
    """How many cores this process may keep busy: those of its affinity, fewer where a quota says so; at least one."""
    quota = cpu_quota()
    num_cores = len(_affinity())
    return num_cores if quota is None else max(1, min(num_cores, int(quota)))


def share(num_cores: int, sharing: int) -> int:
    """Of `num_cores`, one of `sharing` ranks' part."""
    return max(1, num_cores // sharing)


def cpu_quota(membership: str | None = None, read: Read | None = None) -> float | None:
    """Cores' worth of time that the cgroups of this process allow, the tightest of all; None where none is set.

    membership: /proc/self/cgroup. Version 2, and version 1 with its cpu controller, also side by side.
    """
    read = read or _read
    membership = _read(Path("/proc/self/cgroup")) if membership is None else membership
    quotas = []
    for line in (membership or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            quotas += [_quota_v2(read(folder / "cpu.max")) for folder in _folders(_CGROUPS, path)]
        elif "cpu" in controllers.split(","):
            # Mounted under the name of one or of all its controllers.
            for mount in {controllers, "cpu", "cpu,cpuacct"}:
                quotas += [
                    _quota_v1(read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us"))
                    for folder in _folders(_CGROUPS / mount, path)
                ]
    return min((quota for quota in quotas if quota is not None), default=None)


def _folders(mount: Path, path: str) -> Iterable[Path]:
    """A cgroup's folder and those above it. What is out of sight in a container is its mount itself."""
    own = mount / path.strip("/")
    return [own, *(parent for parent in own.parents if parent.is_relative_to(mount))]


def _quota_v2(text: str | None) -> float | None:
    """cpu.max: "max 100000", or microseconds of each period."""
    words = (text or "").split()
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _quota_v1(quota: str | None, period: str | None) -> float | None:
    """-1 is no quota."""
    return _ratio((quota or "").strip(), (period or "").strip())


def _ratio(quota: str, period: str) -> float | None:
    if not (quota.isascii() and quota.isdigit() and period.isascii() and period.isdigit()):
        return None
    return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None


class CoreClaim:
    """Cores that no other rank of this user on this host takes while this object, or its process, lives."""

    def __init__(self, cores: Sequence[int], locks: Sequence[int]) -> None:
        self.cores = tuple(cores)
        self._locks = locks  # file descriptors

    def pin_thread(self) -> None:
        """Let the calling thread, and those that it will start, run on these cores alone."""
        if self.cores and sys.platform == "linux":
            os.sched_setaffinity(0, self.cores)

    def close(self) -> None:
        for lock in self._locks:
            os.close(lock)
        self._locks = ()


def claim_cores(count: int, allowed: Iterable[int] | None = None, folder: Path | None = None) -> CoreClaim:
    """Take `count` of the allowed cores, those that this process may run on, or none if fewer are free.

    folder: of the lock files.
    """
    allowed = _affinity() if allowed is None else set(allowed)
    taken: list[tuple[int, int]] = []
    if count < len(allowed):  # who may use them all leaves it to the kernel where a thread runs
        try:
            folder = folder or Path(tempfile.gettempdir()) / f"lorafleet-cores-{os.getuid()}"
            folder.mkdir(mode=0o700, exist_ok=True)
            for core in sorted(allowed):
                lock = _try_lock(folder / str(core)) if len(taken) < count else None
                if lock is not None:
                    taken.append((core, lock))
        except OSError:
            pass  # a folder that is somebody else's, a full disk: as if no core were free
    if len(taken) < count:
        for _, lock in taken:
            os.close(lock)
        taken = []
    return CoreClaim([core for core, _ in taken], [lock for _, lock in taken])


def _try_lock(path: Path) -> int | None:
    """A file descriptor that holds the lock; None while another one does."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
