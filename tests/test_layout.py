"""The folders form a graph without cycles: each imports only what stands before it here. And each file has its test."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("controller", "kernels", "proto", "workers")

# From what knows nothing of the others to what knows them all. A file that has a line of its own is no part of its
# folder. Read from the top, this is also the order in which the code explains itself.
ORDER = [
    "proto",
    "kernels",
    "workers/errors.py",
    "workers/address.py",
    "workers/cores.py",
    "workers/found_file.py",
    "workers/rpc.py",
    "workers/switch_interval.py",
    "workers/host_memory.py",
    "workers/options.py",
    "workers/scheduling",
    "workers/config.py",
    "workers/answers",
    "workers/grammars",
    "workers/params.py",
    "workers/request_wire.py",
    "workers/tp",
    "workers/text",
    "workers/adapters",
    "workers/model",
    "workers/sources",
    "workers/ranks",
    "workers/engine",
    "workers/server",
    "workers/offline",
    "workers",
    "controller/arguments",
    "controller/heartbeat.py",
    "controller/gateway/api_keys.py",
    "controller/gateway/cross_origin.py",
    "controller/gateway/limits.py",
    "controller/gateway/options.py",
    "controller/gateway/tenants.py",
    "controller/gateway/config.py",
    "controller/gateway/command.py",
    "controller/config.py",
    "controller/gateway/routing",
    "controller/gateway/metrics",
    "controller/gateway/streams",
    "controller/gateway/api",
    "controller/gateway",
    "controller/fleet",
    "controller/commands",
]

# What is imported before anybody knows whether torch will be needed, or where it is never wanted.
WITHOUT_TORCH = ("controller", "workers/answers", "workers/text", "workers/scheduling")
HEAVY = {"torch", "transformers", "triton", "safetensors", "numpy"}


def modules(*folders: str) -> list[str]:
    """Return the hand-written Python files below some folders, as paths in the repository."""
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return sorted(str(file.relative_to(ROOT)) for file in files if "_pb2" not in file.name)


def imports(module: str) -> Iterator[str]:
    """Yield the full names that a file imports, anywhere in it. `from a import b` is a.b, since b may be a module."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def path_of(name: str) -> str:
    """Return the file of an imported name of ours: a module, or a name in one."""
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        path = Path(*parts[:length])
        if (ROOT / path).with_suffix(".py").is_file():
            return f"{path}.py"
        if (ROOT / path / "__init__.py").is_file():
            return f"{path}/__init__.py"
    raise AssertionError(f"{name} is not here")


def place(path: str) -> int:
    """Return the index in `ORDER` of the line a file belongs to."""
    return max((len(line), number) for number, line in enumerate(ORDER) if f"{path}/".startswith(f"{line}/"))[1]


def has_logic(module: str) -> bool:
    tree = ast.parse((ROOT / module).read_text())
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))


def own_test(module: str) -> Path:
    path = Path(module)
    return ROOT / "tests" / path.parent / f"test_{path.name}"


def named_elsewhere(folder: Path) -> dict[str, Path]:
    """Return the files whose tests have other names, by a folder's docstring, or its README if it is not a package.

    A test's path starts in the folder's place in tests/ or in one above it.
    """
    package, readme = ROOT / folder / "__init__.py", ROOT / folder / "README.md"
    text = readme.read_text() if readme.is_file() else ""
    if package.is_file():
        text = ast.get_docstring(ast.parse(package.read_text())) or ""
    _, _, claims = " ".join(text.split()).partition("Tested elsewhere: ")
    found: dict[str, Path] = {}
    for claim in filter(None, claims.removesuffix(".").split("; ")):
        names, _, test = claim.rpartition(" in ")
        tests = [ROOT / "tests" / place / test for place in (folder, *folder.parents)]
        path = next((path for path in tests if path.is_file()), None)
        assert path is not None, f"{folder} names {test}, which is not there"
        found |= dict.fromkeys((f"{name}.py" for name in re.split(", | and ", names)), path)
    return found


FOLDERS = sorted({Path(module).parent for module in modules("controller", "kernels", "workers")})


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_each_file_has_its_test_under_its_name_or_its_folder_says_which_has_it(folder: Path) -> None:
    files = {Path(module).name: module for module in modules(str(folder)) if Path(module).parent == folder}
    without = {name for name, module in files.items() if has_logic(module) and not own_test(module).is_file()}
    assert set(named_elsewhere(folder)) == without - {"__init__.py"}


@pytest.mark.parametrize("module", modules(*PACKAGES))
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    own = [name for name in imports(module) if name.startswith("lorafleet.") and "_pb2" not in name]
    later = {path_of(name) for name in own if place(path_of(name)) > place(module)}
    assert not later, f"{module} belongs to {ORDER[place(module)]}"


@pytest.mark.parametrize("line", ORDER)
def test_all_that_is_in_the_order_exists(line: str) -> None:
    assert (ROOT / line).exists()


def test_kernels_import_torch_triton_and_each_other() -> None:
    for module in modules("kernels"):
        others = [name for name in imports(module) if name.split(".")[0] not in sys.stdlib_module_names]
        assert {name.split(".")[0] for name in others} <= {"torch", "triton", "lorafleet"}, module


def test_scheduling_decides_with_nothing_but_the_standard_library() -> None:
    ours = ("lorafleet.workers.scheduling.", "lorafleet.workers.errors.")
    for module in modules("workers/scheduling"):
        others = [name for name in imports(module) if not name.startswith(ours)]
        assert {name.split(".")[0] for name in others} <= sys.stdlib_module_names, module


def test_workers_do_not_know_the_controller() -> None:
    for module in modules("workers"):
        assert not [name for name in imports(module) if name.startswith("lorafleet.controller")], module


@pytest.mark.parametrize("folder", WITHOUT_TORCH)
def test_light_folders_import_nothing_heavy(folder: str) -> None:
    for module in modules(folder):
        assert HEAVY.isdisjoint(name.split(".")[0] for name in imports(module)), module


def test_the_gateway_imports_no_ray() -> None:
    for module in modules("controller/gateway"):
        assert "ray" not in {name.split(".")[0] for name in imports(module)}, module


@pytest.mark.parametrize("module", ["lorafleet", "lorafleet.workers", "lorafleet.controller.gateway.server"])
def test_what_must_start_quickly_loads_neither_ray_nor_torch(module: str) -> None:
    code = f"import sys, {module}; print({{'ray', 'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_commands_load_torch_only_when_they_run() -> None:
    code = "import sys, lorafleet.controller.commands.cli; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
