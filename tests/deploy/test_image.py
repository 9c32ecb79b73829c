"""The Dockerfile keeps its promises, as far as that can be read; the locks hold what the project asks for."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from check_image import DOCKER, ROOT, VARIANTS, in_context, parse, problems
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DOCKERFILE = (DOCKER / "Dockerfile").read_text()
DOCKERIGNORE = (ROOT / ".dockerignore").read_text()
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_dockerfile_keeps_its_promises(variant: str) -> None:
    assert list(problems(DOCKERFILE, DOCKERIGNORE, variant)) == []


FAULTS = {
    "a base by its tag alone": (r"(slim-bookworm)@sha256:\w+", r"\1", "not pinned by a digest"),
    "a base with a compiler": ("3.11.17-slim-", "3.11.17-", "may have a compiler"),
    "a folder that is not there": ("COPY workers ", "COPY walkers ", "walkers is not there"),
    "a folder that is not sent": ("COPY workers ", "COPY tests ", "keeps tests out"),
    "a stage that is not there": ("--from=install /opt", "--from=instal /opt", "no stage instal"),
    "a file from the network": ("COPY workers ", "ADD https://example.org/x ", "ADD is not to be used"),
    "a command that CI does not run": ("RUN groupadd", "RUN apt-get update && groupadd", "checked nowhere"),
    "a script that is not there": ("/steps/install.sh /opt", "/steps/instal.sh /opt", "checked nowhere"),
    "root": ("USER 10001:10001", "USER root", "USER is not a number"),
    "a number that hosts use": ("USER 10001:10001", "USER 1000:1000", "USER is not a number"),
    "another entry point": (r'\["lorafleet"\]', '["bash"]', "ENTRYPOINT is not"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_dockerfile_is_named(fault: str) -> None:
    old, new, said = FAULTS[fault]
    faulty, count = re.subn(old, new, DOCKERFILE)
    assert count
    found = list(problems(faulty, DOCKERIGNORE, "cpu"))
    assert any(said in problem for problem in found), found


def test_the_last_pattern_that_matches_a_path_or_its_folder_decides_whether_it_is_sent() -> None:
    rules = "# all but\n*\n!a\n!b/c\na/built\n**/*.pyc\n"
    sent = ["a", "a/x", "a/x/y", "b/c", "b/c/x"]
    kept = ["x", "b", "b/x", "a/built", "a/built/x", "a/x.pyc", "b/c/d/x.pyc"]
    assert [path for path in sent if not in_context(path, rules)] == []
    assert [path for path in kept if in_context(path, rules)] == []


@pytest.mark.parametrize("path", [".git/config", ".venv/bin/python", "tests/conftest.py", "kernels/cpu/prebuilt/a.so"])
def test_what_is_no_part_of_the_image_is_not_sent(path: str) -> None:
    assert not in_context(path, DOCKERIGNORE)


def test_a_variant_chooses_the_lock_file_and_nothing_else() -> None:
    cpu, cuda = (repr(parse(DOCKERFILE, variant)) for variant in VARIANTS)
    assert cpu != cuda
    assert cpu.replace("requirements-cpu.txt", "requirements-cuda.txt") == cuda


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda script: script.name)
def test_a_script_stops_at_what_fails_and_is_plain_shell(script: Path) -> None:
    assert "\nset -eu\n" in script.read_text()
    subprocess.run(["sh", "-n", script], check=True, timeout=10)


def locked(name: str) -> dict[str, tuple[Version, int]]:
    """The version of each package in a lock file, and how many hashes it has."""
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


def fake_index(lock: ModuleType, monkeypatch: pytest.MonkeyPatch, packages: dict[str, dict[str, list[str]]]) -> None:
    """An index that has these packages: what each version of them requires."""

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
    packages = {"a": {"1": ["c"]}, "b": {"1": ["c<3", 'd; extra == "more"']}, "c": {"1": [], "2": [], "3": []}}
    fake_index(lock, monkeypatch, packages | {"d": {"1": [], "2rc1": []}})
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
