"""The repository keeps its own rules: copies agree, nothing is left undone. Imports: test_layout.py."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from lorafleet.controller.commands.cli import make_parser
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.offline.args import EngineArgs

ROOT = Path(__file__).parent.parent
PACKAGES = ("controller", "kernels", "proto", "workers")
PROTOC = "1.76.0"


@pytest.mark.parametrize("folder", ["proto", "kernels"])
def test_folders_that_would_shadow_another_library_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_pyproject_lists_every_folder_with_python_files() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(ROOT) for folder in PACKAGES for file in (ROOT / folder).rglob("*.py")}
    assert sorted(listed) == sorted(["lorafleet"] + [".".join(["lorafleet", *folder.parts]) for folder in folders])


def protoc_version() -> str | None:
    try:
        return version("grpcio-tools")
    except PackageNotFoundError:
        return None


@pytest.mark.skipif(protoc_version() != PROTOC, reason=f"the stubs are made by grpcio-tools {PROTOC}")
def test_the_committed_stubs_are_what_protoc_makes(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    sources = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "proto").glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "lorafleet/proto=proto", *outputs, *sources]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    fresh = {file.name: file.read_text() for file in (tmp_path / "lorafleet" / "proto").iterdir()}
    committed = {file.name: file.read_text() for file in (ROOT / "proto").glob("*_pb2*") if file.is_file()}
    assert fresh.keys() == committed.keys()
    assert [name for name in fresh if fresh[name] != committed[name]] == [], "run `make proto`"


def serve_parser() -> ArgumentParser:
    (commands,) = (action for action in make_parser()._actions if isinstance(action, _SubParsersAction))
    parser = commands.choices["serve"]
    assert isinstance(parser, ArgumentParser)
    return parser


def serve_flags() -> dict[str, Any]:
    """The default of each flag of `lorafleet serve`."""
    return {flag: action.default for action in serve_parser()._actions for flag in action.option_strings}


def test_engine_args_have_the_flags_of_serve_and_their_defaults() -> None:
    flags = serve_flags()
    assert EngineArgs(model="m").max_adapter_wait_s == 0.0, "offline there is no bound"
    for field in dataclasses.fields(EngineArgs):
        if field.name not in ("model", "max_adapter_wait_s"):
            flag = "--" + field.name.replace("_", "-")
            assert (flag, field.default) == (flag, flags.get(flag, "no such flag"))


@pytest.mark.parametrize("kind", [EngineConfig, LoRAConfig])
def test_the_configs_and_serve_agree_on_defaults(kind: type[Any]) -> None:
    flags = serve_flags()
    for field in dataclasses.fields(kind):
        flag = "--" + field.name.replace("_", "-")
        if flags.get(flag) is not None:
            assert (flag, flags[flag]) == (flag, field.default)


def commands(text: str) -> Iterator[str]:
    """The `lorafleet serve` commands of a document, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        _, found, rest = line.partition("lorafleet serve")
        if found:
            yield rest.split("`")[0]


@pytest.mark.parametrize("document", ["README.md", "Makefile"])
def test_every_flag_that_a_document_gives_serve_exists(document: str) -> None:
    flags = serve_flags()
    for command in commands((ROOT / document).read_text()):
        named = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", command)
        assert [flag for flag in named if flag not in flags] == [], shlex.quote(command)


def test_the_makefiles_demo_is_among_the_commands_that_are_checked() -> None:
    (demo,) = commands((ROOT / "Makefile").read_text())
    assert "--enable-lora" in demo


def test_nothing_outside_the_tests_is_marked_as_still_to_do() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    marks = re.compile(rb"\b(TODO|FIXME|XXX)\b")
    files = [ROOT / name for name in listed.stdout.split("\0") if name and not name.startswith("tests/")]
    contents = {file: file.read_bytes() for file in files if file.is_file()}
    # Weights and pictures hold any bytes, these among them.
    texts = {file: content for file, content in contents.items() if b"\0" not in content}
    assert texts
    assert [file for file, content in texts.items() if marks.search(content)] == []
