"""Run by `make package`, outside the tree: the installed wheel is whole, and its heavy parts are lazy.

Usage: python -P check_wheel.py DIRECTORY-WITH-THE-INSTALLED-WHEEL
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXPECTED = [
    "controller/cli.py",
    "controller/gateway/__main__.py",
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
import lorafleet.workers
assert "torch" not in sys.modules, "importing lorafleet.workers imports torch"
import lorafleet.controller.cli
assert "torch" not in sys.modules and "ray" not in sys.modules, "the CLI starts slowly"
from lorafleet.workers import LLM, SamplingParams
assert LLM.__module__ == "lorafleet.workers.llm"
assert LLM.__init__.__code__.co_filename.startswith({root!r}), "imported from elsewhere"
"""


def main(root: Path) -> None:
    package = root / "lorafleet"
    missing = [name for name in EXPECTED if not (package / name).is_file()]
    assert not missing, f"the wheel lacks {missing}"
    assert list((package / "kernels" / "cpu").glob("*.cpp")), "the wheel lacks the kernels' C++ sources"
    assert not list(root.rglob("tests")), "the wheel carries the tests"
    # -I: no working directory and no user site on the path, and the editable install's hook is out of the way below.
    code = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]\n" + IMPORTS
    subprocess.run([sys.executable, "-I", "-c", code.format(root=str(root))], check=True, timeout=120)
    print(f"wheel ok: {sum(1 for _ in package.rglob('*.py'))} modules")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
