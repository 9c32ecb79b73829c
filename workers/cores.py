"""CPU cores of a rank: how many it may use, and which ones it claims so that ranks on one host use different cores.

A rank may use the cores that its affinity and its container's CPU quota allow, shared with the other ranks on the host.
Ranks agree on cores through lock files, because they may belong to different workers, even to different fleets, and
start and stop independently. The kernel releases a lock when its process ends.
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
    """Return the number of cores this process may keep busy: its affinity, capped by a CPU quota; at least 1."""
    quota = cpu_quota()
    num_cores = len(_affinity())
    return num_cores if quota is None else max(1, min(num_cores, int(quota)))


def share(num_cores: int, sharing: int) -> int:
    """Return the cores per rank when `sharing` ranks share `num_cores`; at least 1."""
    return max(1, num_cores // sharing)


def cpu_quota(membership: str | None = None, read: Read | None = None) -> float | None:
    """Return the tightest CPU limit among this process's cgroups, in cores; None if none is set.

    membership: the text of /proc/self/cgroup. Handles cgroup v2 and v1 (its cpu controller), also mounted together.
    """
    read = read or _read
    membership = _read(Path("/proc/self/cgroup")) if membership is None else membership
    quotas = []
    for line in (membership or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            quotas += [_quota_v2(read(folder / "cpu.max")) for folder in _folders(_CGROUPS, path)]
        elif "cpu" in controllers.split(","):
            # v1 is mounted under the name of one or all of its controllers.
            for mount in {controllers, "cpu", "cpu,cpuacct"}:
                quotas += [
                    _quota_v1(read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us"))
                    for folder in _folders(_CGROUPS / mount, path)
                ]
    return min((quota for quota in quotas if quota is not None), default=None)


def _folders(mount: Path, path: str) -> Iterable[Path]:
    """Return a cgroup's folder and its ancestors. In a container they may be hidden; then the mount itself counts."""
    own = mount / path.strip("/")
    return [own, *(parent for parent in own.parents if parent.is_relative_to(mount))]


def _quota_v2(text: str | None) -> float | None:
    """Parse cpu.max: "max 100000", or the quota and the period in microseconds."""
    words = (text or "").split()
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _quota_v1(quota: str | None, period: str | None) -> float | None:
    """Parse cpu.cfs_quota_us and cpu.cfs_period_us. A quota of -1 means none."""
    return _ratio((quota or "").strip(), (period or "").strip())


def _ratio(quota: str, period: str) -> float | None:
    if not (quota.isascii() and quota.isdigit() and period.isascii() and period.isdigit()):
        return None
    return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None


class CoreClaim:
    """Cores claimed on this host: no other rank of this user takes them while this object and its process live."""

    def __init__(self, cores: Sequence[int], locks: Sequence[int]) -> None:
        self.cores = tuple(cores)
        self._locks = locks  # file descriptors

    def pin_thread(self) -> None:
        """Restrict the calling thread, and threads it starts later, to these cores."""
        if self.cores and sys.platform == "linux":
            os.sched_setaffinity(0, self.cores)

    def close(self) -> None:
        for lock in self._locks:
            os.close(lock)
        self._locks = ()


def claim_cores(count: int, allowed: Iterable[int] | None = None, folder: Path | None = None) -> CoreClaim:
    """Claim `count` of the allowed cores, or none if fewer are free.

    allowed: by default, this process's affinity. folder: where the lock files are.
    """
    allowed = _affinity() if allowed is None else set(allowed)
    taken: list[tuple[int, int]] = []
    if count < len(allowed):  # a rank that may use all cores leaves placement to the kernel
        try:
            folder = folder or Path(tempfile.gettempdir()) / f"lorafleet-cores-{os.getuid()}"
            folder.mkdir(mode=0o700, exist_ok=True)
            for core in sorted(allowed):
                lock = _try_lock(folder / str(core)) if len(taken) < count else None
                if lock is not None:
                    taken.append((core, lock))
        except OSError:
            pass  # another user's folder, a full disk: treated as no free core
    if len(taken) < count:
        for _, lock in taken:
            os.close(lock)
        taken = []
    return CoreClaim([core for core, _ in taken], [lock for _, lock in taken])


def _try_lock(path: Path) -> int | None:
    """Return a file descriptor that holds the lock; None if another process holds it."""
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
