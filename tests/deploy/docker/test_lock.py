"""The image's locks hold the project's requirements; lock.py chooses the right versions and wheels."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from check_image import DOCKER, ROOT, VARIANTS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

RUNTIME_LOCKS = [f"requirements-{variant}.txt" for variant in VARIANTS]


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    """deploy/docker/lock.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("lorafleet_image_lock", DOCKER / "lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def locked(name: str) -> dict[str, tuple[Version, int]]:
    """Return the version of each package in a lock file, and its number of hashes."""
    joined = (DOCKER / name).read_text().replace("\\\n", "")
    entries = [line.split() for line in joined.splitlines() if line[0].isalnum()]
    pairs = [(words[0].split("=="), sum(word.startswith("--hash=sha256:") for word in words)) for words in entries]
    return {package: (Version(version), hashes) for (package, version), hashes in pairs}


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("name", ["requirements-build.txt", *RUNTIME_LOCKS])
def test_a_lock_has_hashes_and_the_versions_that_the_project_is_tested_with(name: str) -> None:
    lock, pinned = locked(name), constraints()
    assert [package for package, (_, hashes) in lock.items() if not hashes] == []
    public = {package: Version(version.public) for package, (version, _) in lock.items()}
    assert {package: version for package, version in public.items() if pinned.get(package, version) != version} == {}, (
        "run deploy/docker/lock.py"
    )


@pytest.mark.parametrize("name", RUNTIME_LOCKS)
def test_a_lock_has_what_the_project_depends_on(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = locked(name)
    for requirement in map(Requirement, project["dependencies"]):
        version, _ = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, but {version} is locked"


def test_a_lock_has_nothing_that_only_developers_need() -> None:
    tools = {"build", "hypothesis", "mypy", "peft", "pytest", "ruff", "scipy"}
    assert [name for name in RUNTIME_LOCKS if tools & locked(name).keys()] == []


def test_the_locks_of_the_variants_differ_in_torch_and_cuda() -> None:
    cpu, cuda = (locked(name) for name in RUNTIME_LOCKS)
    assert {package for package in cpu if cuda[package] != cpu[package]} == {"torch"}
    assert str(cpu["torch"][0]).endswith("+cpu")
    assert {package.split("-")[0] for package in cuda.keys() - cpu.keys()} == {"cuda", "nvidia", "triton"}


Packages = dict[str, dict[str, list[str]]]  # what each version of each requires


def fake_index(lock: ModuleType, monkeypatch: pytest.MonkeyPatch, packages: Packages) -> None:
    """An index that has these packages."""

    def wheels(name: str) -> tuple[Any, ...]:
        any_machine = frozenset({lock.Tag("py3", "none", "any")})
        return tuple(lock.Wheel(Version(it), any_machine, "0" * 64, f"{name} {it}") for it in packages[name])

    def requirements(url: str) -> tuple[Requirement, ...]:
        name, version = url.split()
        return tuple(map(Requirement, packages[name][version]))

    monkeypatch.setattr(lock, "wheels", wheels)
    monkeypatch.setattr(lock, "requirements", requirements)


def test_the_newest_version_that_all_allow_is_locked_whoever_is_asked_first(
    lock: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages: Packages = {
        "a": {"1": ["c"]},
        "b": {"1": ["c<3", 'd; extra == "more"']},
        "c": {"1": [], "2": [], "3": []},
        "d": {"1": [], "2rc1": []},
    }
    fake_index(lock, monkeypatch, packages)
    for roots in (("a", "b[more]"), ("b[more]", "a"), ("a", "b", "b[more]")):
        chosen = lock.resolve(lock.Lock(Path(), roots, cpu=False), {}, "x86_64")
        assert {name: str(version) for name, version in chosen.items()} == {"a": "1", "b": "1", "c": "2", "d": "1"}


def test_a_pin_that_is_not_allowed_is_named_with_who_forbids_it(
    lock: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_index(lock, monkeypatch, {"a": {"1": ["c<3"]}, "c": {"2": [], "3": []}})
    with pytest.raises(lock.LockError, match=r"c is pinned at 3.*'a', '<3'"):
        lock.resolve(lock.Lock(Path(), ("a",), cpu=False), {"c": Version("3")}, "x86_64")


def test_the_wheel_of_a_machine_is_the_most_specific_one(lock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        "cp311-cp311-manylinux_2_28_x86_64",
        "cp311-cp311-manylinux2014_x86_64",
        "cp39-abi3-manylinux_2_17_aarch64",
    ]
    tags = [frozenset({lock.Tag(*file.split("-"))}) for file in [*files, "py3-none-any"]]
    found = tuple(lock.Wheel(Version("1"), tag, str(number) * 64, str(number)) for number, tag in enumerate(tags))
    monkeypatch.setattr(lock, "wheels", lambda name: found)
    assert lock.best("a", Version("1"), "x86_64") is found[0]
    assert lock.best("a", Version("1"), "aarch64") is found[2]
    with pytest.raises(lock.LockError, match="no wheel for Linux on x86_64"):
        lock.best("a", Version("2"), "x86_64")
