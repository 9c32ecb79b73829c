"""The repository keeps its own rules: copies agree, nothing is left undone. Imports: test_layout.py."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from documents import PAGES

from lorafleet.controller.commands.command_table import COMMANDS

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
    assert sorted(listed) == sorted(
        ["lorafleet", "lorafleet.examples"] + [".".join(["lorafleet", *folder.parts]) for folder in folders]
    )


MODULES = [
    str(file.relative_to(ROOT))
    for folder in ("controller", "workers")
    for file in sorted((ROOT / folder).rglob("*.py"))
]

MAX_BY_POSITION = 5
# Options are made of flags, by name; a kernel's op has no names for its arguments.
OPTIONS = (
    "workers/config.py",
    "workers/offline/args.py",
    "controller/config.py",
    "controller/gateway/config.py",
    "controller/gateway/limits.py",
    "controller/gateway/options.py",
)
OPS = {"rope_kv_write_", "paged_attention", "sample_tokens", "empty"}
VARIADIC = {"to_thread", "partial", "_reply"}  # hand on what they are given


def fields_by_position(node: ast.ClassDef) -> int:
    """Return how many arguments a dataclass takes by position."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if not any(text.startswith("dataclass") and "kw_only=True" not in text for text in decorators):
        return 0
    fields = [ast.unparse(field) for field in node.body if isinstance(field, ast.AnnAssign)]
    fields = [field for field in fields if "init=False" not in field and "ClassVar" not in field]
    return fields.index("_: KW_ONLY") if "_: KW_ONLY" in fields else len(fields)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in OPTIONS])
def test_more_than_five_arguments_are_given_by_name(module: str) -> None:
    found = []
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.ClassDef):
            count, name = fields_by_position(node), node.name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            count, name = len(names) - (names[:1] in (["self"], ["cls"])), node.name
        elif isinstance(node, ast.Call):
            count, name = len(node.args), ast.unparse(node.func).rpartition(".")[2]
            count = 0 if name in OPS | VARIADIC else count
        else:
            continue
        if count > MAX_BY_POSITION:
            found.append(f"line {node.lineno}: {name} takes {count}")
    assert found == []


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


def flags_of(*names: str) -> set[str]:
    """The flags of some commands; of all, if none is named."""
    found = {"--help", "--version"}
    for command in COMMANDS:
        if not names or command.name in names:
            parser = ArgumentParser(add_help=False)
            command.add_flags(parser)
            found |= parser._option_string_actions.keys()
    return found


def flags_in(text: str) -> list[str]:
    """Return the flags named in a text, except those of `ray start`."""
    named = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])", text)
    return [flag for flag in named if not ("ray start" in text and flag in ("--head", "--address"))]


def texts(module: str) -> Iterator[str]:
    """The texts of a file that somebody may read while the program runs: all but docstrings."""
    tree = ast.parse((ROOT / module).read_text())
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
    docs = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


PIPS = "workers/sources/demo.py"  # it names flags of pip


@pytest.mark.parametrize("module", [module for module in MODULES if module != PIPS])
def test_every_flag_that_a_message_names_is_a_flag_of_a_command(module: str) -> None:
    known = flags_of()
    assert [flag for text in texts(module) for flag in flags_in(text) if flag not in known] == []


@pytest.mark.parametrize("name", ["__main__", "api_keys", "config", "limits", "options", "tenants"])
def test_what_a_gateway_is_told_of_its_flags_names_flags_that_it_has(name: str) -> None:
    known = flags_of("gateway")
    texts_of = list(texts(f"controller/gateway/{name}.py"))
    assert [flag for text in texts_of for flag in flags_in(text) if flag not in known] == []


def test_alerts_name_flags_that_there_are() -> None:
    known = flags_of()
    assert [flag for flag in flags_in((ROOT / "deploy/monitoring/rules.yaml").read_text()) if flag not in known] == []


def commands(text: str) -> Iterator[str]:
    """The `lorafleet serve` commands of a document, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        _, found, rest = line.partition("lorafleet serve")
        if found:
            yield rest.split("`")[0]


@pytest.mark.parametrize("document", PAGES)
def test_every_flag_that_a_document_gives_serve_exists(document: str) -> None:
    flags = flags_of("serve")
    for command in commands((ROOT / document).read_text()):
        named = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", command)
        assert [flag for flag in named if flag not in flags] == [], shlex.quote(command)


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
