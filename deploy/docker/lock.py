"""Writes the image's lock files: each installed package, its version, the SHA-256 of its wheels.

    python deploy/docker/lock.py            versions of constraints.txt, and for other packages those already locked
    python deploy/docker/lock.py --upgrade  the newest versions of packages that constraints.txt does not pin
    python deploy/docker/lock.py --check    writes nothing; fails if a lock differs from what would be written

Reads versions, metadata and hashes from PyPI's index (PEP 691, PEP 658) and downloads no wheel. It takes the
newest version of a package that all requirements allow, and does not backtrack: if that fails, it names the
conflicting requirement, which is then to be pinned in constraints.txt. Needs `packaging` (in the pinned environment).
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from functools import cache
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
INDEX = "https://pypi.org/simple"
PYTHON = "3.11.17"  # the base image's
GLIBC_MINOR = 36  # bookworm's glibc is 2.36
MACHINES = ("x86_64", "aarch64")
# PyPI's torch is the CUDA build. The CPU builds are on PyTorch's own server, which has no API; these are its files.
TORCH_CPU_PAGE = "https://download.pytorch.org/whl/cpu/torch/"
TORCH_CPU = {
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
    ),
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_aarch64.whl": (
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7"
    ),
}


class LockError(Exception):
    """No lock can be written; the message says why."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file of a release."""

    version: Version
    tags: frozenset[Tag]
    sha256: str
    url: str


@dataclass(frozen=True, slots=True)
class Lock:
    """The contents of one lock file."""

    path: Path
    roots: tuple[str, ...]  # requirements, as in pyproject.toml
    cpu: bool  # whether torch is the CPU build


def locks() -> list[Lock]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = tuple(project["project"]["dependencies"])
    tools = ("build", *project["build-system"]["requires"])
    return [
        Lock(HERE / "requirements-build.txt", tools, cpu=False),
        Lock(HERE / "requirements-cpu.txt", runtime, cpu=True),
        Lock(HERE / "requirements-cuda.txt", runtime, cpu=False),
    ]


def pins(path: Path) -> dict[str, Version]:
    """Return the versions by name from lines name==version, as in constraints.txt and the locks."""
    lines = path.read_text().splitlines() if path.exists() else []
    words = [line.split()[0] for line in lines if "==" in line and line[0].isalnum()]
    return {canonicalize_name(name): Version(version) for name, version in (word.split("==") for word in words)}


def fetch(url: str, **headers: str) -> bytes:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            content: bytes = response.read()
    except (urllib.error.URLError, TimeoutError) as error:
        raise LockError(f"{url}: {error}") from error
    return content


class RemoteFile(RawIOBase):
    """A file on a server; only the parts that are read are transferred."""

    def __init__(self, url: str) -> None:
        self._url = url
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as response:
            self._size = int(response.headers["Content-Length"])
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        content = fetch(self._url, Range=f"bytes={self._at}-{end - 1}")
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


@cache
def tag_ranks(machine: str) -> dict[Tag, int]:
    """Return the tags that the base image's pip accepts, best first."""
    old_names = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    platforms = []
    for minor in range(GLIBC_MINOR, 4, -1):
        platforms.append(f"manylinux_2_{minor}_{machine}")
        if minor in old_names:
            platforms.append(f"{old_names[minor]}_{machine}")
    tags = [*cpython_tags((3, 11), platforms=platforms), *compatible_tags((3, 11), "cp311", platforms)]
    return {tag: rank for rank, tag in enumerate(tags)}


@cache
def wheels(name: str) -> tuple[Wheel, ...]:
    """Return a package's wheels that this Python can run on either machine, without withdrawn ones."""
    page: dict[str, Any] = json.loads(fetch(f"{INDEX}/{name}/", Accept="application/vnd.pypi.simple.v1+json"))
    found = []
    for file in page["files"]:
        if not file["filename"].endswith(".whl") or file["yanked"]:
            continue
        try:
            runs = SpecifierSet(file["requires-python"] or "").contains(PYTHON)
        except InvalidSpecifier:  # some old releases; pip accepts them too
            runs = True
        try:
            _, version, _, tags = parse_wheel_filename(file["filename"])
        except InvalidWheelFilename:  # some old releases; pip skips them
            continue
        if runs and any(tag in tag_ranks(machine) for tag in tags for machine in MACHINES):
            found.append(Wheel(version, tags, file["hashes"]["sha256"], file["url"]))
    return tuple(found)


def best(name: str, version: Version, machine: str) -> Wheel:
    """Return the wheel that pip chooses on that machine."""
    ranks = tag_ranks(machine)
    fitting = [
        (min(ranks[tag] for tag in wheel.tags if tag in ranks), wheel.url, wheel)
        for wheel in wheels(name)
        if wheel.version == version and not ranks.keys().isdisjoint(wheel.tags)
    ]
    if not fitting:
        raise LockError(f"{name} {version} has no wheel for Linux on {machine}")
    return min(fitting)[-1]


@cache
def requirements(url: str) -> tuple[Requirement, ...]:
    try:
        content = fetch(f"{url}.metadata")
    except LockError:  # a mirror may lack a wheel's separate metadata
        with ZipFile(BufferedReader(RemoteFile(url), 1 << 16)) as wheel:
            content = wheel.read(next(file for file in wheel.namelist() if file.endswith(".dist-info/METADATA")))
    metadata = Parser().parsestr(content.decode())
    return tuple(Requirement(line) for line in metadata.get_all("Requires-Dist", []))


def needed(name: str, version: Version, extras: set[str], machine: str, cpu: bool) -> Iterator[Requirement]:
    """Return the requirements of a package with some of its extras on that machine."""
    environment = {
        "implementation_name": "cpython",
        "implementation_version": PYTHON,
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        # The CPU build has the CUDA build's requirements without CUDA, which the CUDA build requires on Linux.
        "platform_system": "" if name == "torch" and cpu else "Linux",
        "platform_version": "",
        "python_full_version": PYTHON,
        "python_version": PYTHON.rpartition(".")[0],
        "sys_platform": "linux",
    }
    for requirement in requirements(best(name, version, machine).url):
        marker = requirement.marker
        if marker is None or any(marker.evaluate(environment | {"extra": extra}) for extra in {"", *extras}):
            yield requirement


def resolve(lock: Lock, pinned: dict[str, Version], machine: str) -> dict[str, Version]:
    """Return a version for each package needed, directly or indirectly, on that machine."""
    allowed: dict[str, set[tuple[str, str]]] = {}  # package -> (who requires it, which versions)
    while True:
        chosen: dict[str, Version] = {}
        extras: dict[str, set[str]] = {}
        waiting = [("pyproject.toml", Requirement(root)) for root in lock.roots]
        while waiting:
            parent, requirement = waiting.pop()
            name = canonicalize_name(requirement.name)
            allowed.setdefault(name, set()).add((parent, str(requirement.specifier)))
            if name not in chosen:
                chosen[name] = choose(name, pinned, allowed[name])
            elif extras[name] >= requirement.extras:
                continue
            extras[name] = extras.get(name, set()) | requirement.extras
            waiting += [(name, further) for further in needed(name, chosen[name], extras[name], machine, cpu=lock.cpu)]
        if all(
            SpecifierSet(versions).contains(chosen[name], prereleases=True)
            for name in chosen
            for _, versions in allowed[name]
        ):
            return chosen
        # A version was chosen before all its restrictions were known; now they are.


def choose(name: str, pinned: dict[str, Version], allowed: set[tuple[str, str]]) -> Version:
    specifiers = SpecifierSet(",".join(versions for _, versions in allowed if versions))
    if name in pinned:
        if not specifiers.contains(pinned[name], prereleases=True):
            raise LockError(f"{name} is pinned at {pinned[name]}, but required are {sorted(allowed)}")
        return pinned[name]
    fitting = [wheel.version for wheel in wheels(name) if specifiers.contains(wheel.version, prereleases=False)]
    if not fitting:
        raise LockError(f"no {name} is allowed by all that require it: {sorted(allowed)}")
    return max(fitting)


def text(lock: Lock, pinned: dict[str, Version]) -> str:
    """Return the whole file."""
    chosen = {machine: resolve(lock, pinned, machine) for machine in MACHINES}
    lines = [
        "# Written by deploy/docker/lock.py, for CPython 3.11 on Linux, x86_64 and aarch64. Wheels only, no compiling.",
        "--only-binary :all:",
    ]
    if lock.cpu:
        lines.append(f"--find-links {TORCH_CPU_PAGE}")
    for name in sorted(set().union(*chosen.values())):
        where = [machine for machine in MACHINES if name in chosen[machine]]
        (version,) = {chosen[machine][name] for machine in where}
        hashes = {best(name, version, machine).sha256 for machine in where}
        if name == "torch" and lock.cpu:
            version = Version(f"{version}+cpu")
            hashes = {digest for file, digest in TORCH_CPU.items() if parse_wheel_filename(file)[1] == version}
            if len(hashes) != len(MACHINES):
                raise LockError(f"lock.py knows no CPU build of torch {version}; {TORCH_CPU_PAGE} has their hashes")
        marker = "" if len(where) == len(MACHINES) else f' ; platform_machine == "{where[0]}"'
        lines.append(
            " \\\n    ".join([f"{name}=={version}{marker}", *(f"--hash=sha256:{it}" for it in sorted(hashes))])
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the image's lock files.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--upgrade", action="store_true", help="the newest of what constraints.txt does not pin")
    args = parser.parse_args()
    differ = False
    for lock in locks():
        kept = {} if args.upgrade else pins(lock.path)
        kept.pop("torch", None)
        fresh = text(lock, kept | pins(ROOT / "constraints.txt"))
        old = lock.path.read_text() if lock.path.exists() else ""
        if args.check:
            differ = differ or fresh != old
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), fresh.splitlines(True), str(lock.path)))
        else:
            lock.path.write_text(fresh)
            print(f"{lock.path.name}: {len(pins(lock.path))} packages")
    if differ:
        sys.exit("The locks are not what lock.py would write.")


if __name__ == "__main__":
    try:
        main()
    except LockError as error:
        sys.exit(str(error))
