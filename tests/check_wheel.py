"""Run by `make package`, outside the tree: the installed wheel is whole, its heavy parts are lazy, its kernels run.

Usage: python -P check_wheel.py DIRECTORY-WITH-THE-INSTALLED-WHEEL
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

EXPECTED = [
    "__init__.py",
    "controller/commands/cli.py",
    "controller/commands/demo.py",
    "controller/gateway/__main__.py",
    "examples/adapters/sql/adapter_model.safetensors",
    "kernels/lora.py",
    "kernels/py.typed",
    "proto/controller.proto",
    "proto/worker_pb2.py",
    "proto/worker_pb2_grpc.py",
    "workers/__init__.py",
    "workers/engine/loop.py",
    "workers/text/tokenizer.py",
]
IMPORTS = """
import sys
sys.path.insert(0, {root!r})
import lorafleet
assert "torch" not in sys.modules and "ray" not in sys.modules, "importing lorafleet imports torch or Ray"
import lorafleet.controller.commands.cli
assert "torch" not in sys.modules and "ray" not in sys.modules, "the CLI starts slowly"
from lorafleet import LLM, SamplingParams
from lorafleet.workers import LLM as same
assert same is LLM
assert LLM.__module__ == "lorafleet.workers.offline.llm"
assert LLM.__init__.__code__.co_filename.startswith({root!r}), "imported from elsewhere"
"""
# The wheel has a library for each level, and the chosen one computes without a warning and like the reference.
KERNELS = """
import os, pathlib, platform, sys, warnings
sys.path.insert(0, {root!r})
import torch
warnings.simplefilter("error")
from lorafleet.kernels import build, native
from lorafleet.kernels.norm import rms_norm, rms_norm_reference
assert build.__file__.startswith({root!r}), "imported from elsewhere"
names = [build.file_name(level) for level in build.LEVELS if level.machine == platform.machine()]
carried = sorted(path.name for path in build.PREBUILT.glob("*"))
assert names and carried == sorted(names), f"the wheel carries {{carried}}, not {{names}}"
(info,) = pathlib.Path({root!r}).glob("lorafleet-*.dist-info")
tag = "Tag: py3-none-" + build.wheel_platform(build.PREBUILT.glob("*.so"))
assert tag in (info / "WHEEL").read_text().splitlines(), f"the wheel is not tagged {{tag}}"
levels = [level.name for level in build.supported_levels()]
level = os.environ.get("LORAFLEET_CPU_LEVEL", levels[0])
loaded = pathlib.Path(native.library()._name)
assert loaded.parent == build.PREBUILT and loaded.name.startswith(level + "-"), f"{{loaded}} was loaded for {{level}}"
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    x, weight = torch.randn(5, 77).to(dtype), torch.randn(77).to(dtype)
    expected = rms_norm_reference(x, weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, atol=tolerance, rtol=tolerance)
print(*levels)
"""


def main(root: Path) -> None:
    package = root / "lorafleet"
    missing = [name for name in EXPECTED if not (package / name).is_file()]
    assert not missing, f"the wheel lacks {missing}"
    assert list((package / "kernels" / "cpu").glob("*.cpp")), "the wheel lacks the kernels' C++ sources"
    assert not list(root.rglob("tests")), "the wheel carries the tests"
    run(IMPORTS, root)
    levels = run(KERNELS, root).split()
    run(KERNELS, root, LORAFLEET_CPU_LEVEL=levels[-1])
    num_modules = sum(1 for _ in package.rglob("*.py"))
    print(f"wheel ok: {num_modules} modules, kernels tried at the levels {levels[0]} and {levels[-1]}")


def run(code: str, root: Path, **environment: str) -> str:
    """Run code outside the tree, without a compiler, with an empty cache that must stay empty. Return its output."""
    # -I: no working directory and no user site on the path; and the editable install's hook is out of the way.
    code = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]\n" + code
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code.format(root=str(root))],
            env={"PATH": "/nonexistent", "HOME": cache, "LORAFLEET_CACHE": cache} | environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=120,
        )
        assert list(Path(cache).iterdir()) == [], "something was written into the cache"
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
