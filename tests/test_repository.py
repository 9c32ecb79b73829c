"""The repository keeps its own rules: imports point one way, what is written twice agrees, nothing is left undone."""

from __future__ import annotations

import ast
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

from lorafleet.controller.cli import make_parser
from lorafleet.workers.args import EngineArgs
from lorafleet.workers.config import EngineConfig, LoRAConfig

ROOT = Path(__file__).parent.parent
PACKAGES = ("controller", "kernels", "proto", "workers")
PROTOC = "1.76.0"


def modules(*folders: str) -> list[str]:
    """The hand-written Python files below some folders, as paths in the repository."""
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return sorted(str(file.relative_to(ROOT)) for file in files if "_pb2" not in file.name)


def imports(module: str) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it. `from a import b` is a.b: b may be a module."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def outside(module: str, allowed: tuple[str, ...]) -> list[str]:
    """What a file imports that is neither of the standard library nor allowed, nor below what is allowed."""
    return [
        name
        for name in imports(module)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(name == one or name.startswith(f"{one}.") for one in allowed)
    ]


@pytest.mark.parametrize("module", modules("kernels"))
def test_kernels_import_torch_triton_and_each_other(module: str) -> None:
    assert outside(module, ("torch", "triton", "lorafleet.kernels")) == []


# Of the engine's modules, those that have their decisions carried out.
CARRY_OUT = [f"workers/engine/{name}.py" for name in ("loop", "registered", "slot_loader")]


@pytest.mark.parametrize("module", [module for module in modules("workers/engine") if module not in CARRY_OUT])
def test_the_engine_decides_with_nothing_but_the_standard_library(module: str) -> None:
    assert outside(module, ("lorafleet.workers.engine", "lorafleet.workers.errors")) == []


@pytest.mark.parametrize("module", modules("workers"))
def test_workers_import_kernels_and_proto_and_never_the_controller(module: str) -> None:
    own = [name for name in imports(module) if name.startswith("lorafleet.")]
    allowed = ("lorafleet.workers", "lorafleet.kernels", "lorafleet.proto")
    assert [name for name in own if not name.startswith(allowed)] == []


@pytest.mark.parametrize("module", modules("controller"))
def test_the_controller_imports_the_light_parts_of_workers(module: str) -> None:
    light = [
        "actor",
        "adapter_names",
        "address",
        "config",
        "engine.eviction",
        "engine.pace",
        "engine.ranges",
        "engine.request",
        "engine.shares",
        "errors",
        "generation_defaults",
        "load_report",
        "model.source",
        "params",
        "request_wire",
        "rpc",
    ]
    own = [
        name for name in outside(module, ("lorafleet.controller", "lorafleet.proto")) if name.startswith("lorafleet")
    ]
    allowed = tuple(f"lorafleet.workers.{name}" for name in [*light, "text"])
    assert [name for name in own if not any(name == one or name.startswith(f"{one}.") for one in allowed)] == []
    heavy = {"torch", "transformers", "triton", "safetensors", "numpy"}
    assert heavy.isdisjoint(name.split(".")[0] for name in imports(module))


@pytest.mark.parametrize("module", modules("controller/gateway"))
def test_the_gateway_imports_neither_ray_nor_torch(module: str) -> None:
    assert {"ray", "torch", "transformers"}.isdisjoint(name.split(".")[0] for name in imports(module))


@pytest.mark.parametrize("module", modules("workers/text"))
def test_text_imports_neither_torch_nor_ray(module: str) -> None:
    assert {"ray", "torch", "transformers"}.isdisjoint(name.split(".")[0] for name in imports(module))


def test_the_gateway_and_what_it_imports_load_neither_ray_nor_torch() -> None:
    code = "import sys, lorafleet.controller.gateway.server; print({'ray', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("folder", ["proto", "kernels"])
def test_folders_that_would_shadow_another_library_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_pyproject_lists_every_folder_with_python_files() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(ROOT) for folder in PACKAGES for file in (ROOT / folder).rglob("*.py")}
    assert sorted(listed) == sorted(["lorafleet"] + [".".join(["lorafleet", *folder.parts]) for folder in folders])


MAX_BY_POSITION = 5
# Options are made of flags, by name; a kernel's op has no names for its arguments.
OPTIONS = ("workers/config.py", "controller/config.py", "controller/gateway/config.py", "controller/gateway/limits.py")
OPS = {"rope_kv_write_", "paged_attention", "sample_tokens", "empty"}
VARIADIC = {"to_thread", "partial", "_reply"}  # hand on what they are given


def fields_by_position(node: ast.ClassDef) -> int:
    """How many arguments a dataclass takes by position."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if not any(text.startswith("dataclass") and "kw_only=True" not in text for text in decorators):
        return 0
    fields = [ast.unparse(field) for field in node.body if isinstance(field, ast.AnnAssign)]
    fields = [field for field in fields if "init=False" not in field and "ClassVar" not in field]
    return fields.index("_: KW_ONLY") if "_: KW_ONLY" in fields else len(fields)


@pytest.mark.parametrize("module", [module for module in modules("controller", "workers") if module not in OPTIONS])
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
