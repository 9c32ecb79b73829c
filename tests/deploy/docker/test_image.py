"""The Dockerfile keeps its promises, as far as its text shows. `make image-check` runs it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from check_image import DOCKER, ROOT, VARIANTS, in_context, parse, problems

DOCKERFILE = (DOCKER / "Dockerfile").read_text()
DOCKERIGNORE = (ROOT / ".dockerignore").read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_dockerfile_keeps_its_promises(variant: str) -> None:
    assert list(problems(DOCKERFILE, DOCKERIGNORE, variant)) == []


FAULTS = {
    "a base by its tag alone": (r"(slim-bookworm)@sha256:\w+", r"\1", "not pinned by a digest"),
    "a base with a compiler": ("3.11.17-slim-", "3.11.17-", "may have a compiler"),
    "a folder that is not there": ("COPY workers ", "COPY walkers ", "walkers is not there"),
    "a folder that is not sent": ("COPY workers ", "COPY tests ", "keeps tests out"),
    "a stage that is not there": ("--from=install /opt", "--from=instal /opt", "no stage instal"),
    "a stage that is not there, mounted": ("from=build,", "from=bild,", "no stage bild to mount"),
    "an argument that a stage does not name": ("\nARG VARIANT\n", "\n", "requirements-${VARIANT}.txt is not there"),
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
def test_files_that_are_no_part_of_the_image_are_not_sent(path: str) -> None:
    assert not in_context(path, DOCKERIGNORE)


def test_a_variant_chooses_the_lock_file_and_nothing_else() -> None:
    cpu, cuda = (repr(parse(DOCKERFILE, variant)) for variant in VARIANTS)
    assert cpu != cuda
    assert cpu.replace("requirements-cpu.txt", "requirements-cuda.txt") == cuda


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda script: script.name)
def test_a_script_stops_at_what_fails_and_is_plain_shell(script: Path) -> None:
    assert "\nset -eu\n" in script.read_text()
    subprocess.run(["sh", "-n", script], check=True, timeout=10)
