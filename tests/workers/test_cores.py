"""The number and choice of a rank's cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorafleet.workers import cores
from lorafleet.workers.cores import claim_cores, cpu_quota, share

V2 = "/sys/fs/cgroup"
V1 = "/sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {f"{V2}/cpu.max": "max 100000\n"}, None),
        ("0::/\n", {f"{V2}/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {}, None),
        # The tightest of a cgroup and its ancestors.
        ("0::/pod/app\n", {f"{V2}/pod/app/cpu.max": "max 100000", f"{V2}/pod/cpu.max": "400000 100000"}, 4.0),
        ("0::/pod/app\n", {f"{V2}/pod/app/cpu.max": "50000 50000", f"{V2}/pod/cpu.max": "400000 100000"}, 1.0),
        # A container that sees its host's path, but its own cgroup as the root.
        ("0::/kubepods/pod7\n", {f"{V2}/cpu.max": "200000 100000"}, 2.0),
        ("4:cpu,cpuacct:/docker/1\n", {f"{V1}/cpu.cfs_quota_us": "250000", f"{V1}/cpu.cfs_period_us": "100000"}, 2.5),
        ("4:cpu,cpuacct:/\n", {f"{V1}/cpu.cfs_quota_us": "-1\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, None),
        (
            "3:cpuset:/a\n1:cpu:/a\n0::/\n",
            {f"{V2}/cpu/a/cpu.cfs_quota_us": "300000\n", f"{V2}/cpu/a/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        ("3:cpuset:/a\n", {f"{V2}/cpuset/a/cpu.cfs_quota_us": "1", f"{V2}/cpuset/a/cpu.cfs_period_us": "1"}, None),
        # An unreadable quota counts as none.
        ("", {}, None),
        ("nonsense\n", {f"{V2}/cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {f"{V2}/cpu.max": "0 100000"}, None),
        ("0::/\n", {f"{V2}/cpu.max": "150000 0"}, None),
        ("0::/\n", {f"{V2}/cpu.max": "150000"}, None),
        ("0::/\n", {f"{V2}/cpu.max": "-1 x"}, None),
    ],
)
def test_the_quota_is_the_tightest_of_all_cgroups(membership: str, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(membership, lambda path: files.get(str(path))) == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "usable"),
    [(12, None, 12), (12, 4.0, 4), (12, 4.9, 4), (12, 0.5, 1), (2, 64.0, 2), (1, None, 1)],
)
def test_as_many_cores_are_used_as_affinity_and_quota_both_allow(
    affinity: int, quota: float | None, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert cores.num_usable_cores() == usable


@pytest.mark.parametrize(("num_cores", "sharing", "each"), [(12, 1, 12), (12, 5, 2), (2, 2, 1), (2, 3, 1)])
def test_ranks_share_out_the_cores_and_each_has_one_at_least(num_cores: int, sharing: int, each: int) -> None:
    assert share(num_cores, sharing) == each


def test_ranks_of_a_host_take_cores_that_no_other_has(tmp_path: Path) -> None:
    allowed = {1, 3, 5, 6, 7}
    first, second = (claim_cores(2, allowed, tmp_path) for _ in range(2))
    assert (first.cores, second.cores) == ((1, 3), (5, 6))
    # One core is left, two are needed: the kernel decides where that rank runs, and the core stays free for another.
    third = claim_cores(2, allowed, tmp_path)
    assert third.cores == ()
    assert claim_cores(1, allowed, tmp_path).cores == (7,)
    first.close()
    fourth = claim_cores(2, allowed, tmp_path)
    assert fourth.cores == (1, 3)
    for claim in (second, third, fourth):
        claim.close()


def test_who_may_use_all_cores_or_finds_no_place_for_locks_takes_none(tmp_path: Path) -> None:
    assert claim_cores(2, {0, 1}, tmp_path).cores == ()
    (tmp_path / "file").touch()
    assert claim_cores(1, {0, 1}, tmp_path / "file").cores == ()
    assert claim_cores(0, {0, 1}, tmp_path).cores == ()


def test_a_pinned_thread_runs_on_its_cores_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, own: pinned.append(tuple(own)))
    claim_cores(0, {0, 1}, tmp_path).pin_thread()
    assert pinned == []
    claim_cores(1, {0, 1}, tmp_path).pin_thread()
    assert pinned == [(0,)]
