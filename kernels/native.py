"""Compiles kernels/cpu/*.cpp for this machine, once, and loads them.

The library is plain C++ with an `extern "C"` face, called through ctypes with data pointers: seconds to build, no
torch headers. It is linked against torch's own OpenMP runtime, so that `torch.set_num_threads` in the calling thread
governs it and no second pool of threads fights for the cores.

Without a compiler the references run instead, after one warning. LORAFLEET_NATIVE_KERNELS=0 asks for that on purpose.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lorafleet.kernels.cache import cache_root

_SOURCES = Path(__file__).parent / "cpu"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)

_P, _I64, _F32, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
# The C faces, argument by argument; each returns nothing.
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "lf_rms_norm": (_INT, _P, _P, _F32, _P, _I64, _I64),
    "lf_fused_add_rms_norm": (_INT, _P, _P, _P, _F32, _I64, _I64),
    "lf_silu_mul": (_INT, _P, _P, _I64, _I64),
    "lf_rope_kv_write": (_INT, _P, _I64, _P, _P, _P, _P, _P, *(_I64,) * 5, _P, _P, _F32),
    "lf_paged_attention": (_INT, _P, _I64, _P, _P, _P, _I64, _P, _P, _P, *(_I64,) * 5, _F32, _I64),
    "lf_lora_add": (_INT, _INT, _P, _I64, _P, _I64, *(_P,) * 9, *(_I64,) * 5),
}

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_decided = False  # whether _library is final, None included


def library() -> ctypes.CDLL | None:
    """The kernels, built at the first call of any process on this machine; None when the references are to run."""
    global _library, _decided
    if not _decided:
        with _lock:
            if not _decided:
                _library = None if os.environ.get("LORAFLEET_NATIVE_KERNELS") == "0" else _load()
                _decided = True
    return _library


@contextmanager
def references_only() -> Iterator[None]:
    """Run the references within this block, in all threads. For tests."""
    global _library, _decided
    library()
    with _lock:
        kept, _library = _library, None
    try:
        yield
    finally:
        with _lock:
            _library = kept


def _load() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        warnings.warn(
            "No C++ compiler was found, so LoRAFleet's CPU kernels cannot be built: slow references run instead. "
            "Install g++ (apt-get install g++) for many times the speed.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"LoRAFleet's CPU kernels could not be built with {compiler}, so slow references run instead: {detail}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    for name, argtypes in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = argtypes, None
    return loaded


def _built(compiler: str) -> Path:
    """The shared library, compiled if it is not in the cache. Several processes may build at once; one wins."""
    sources = sorted(_SOURCES.glob("*.cpp"))
    key = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        key.update(path.read_bytes())
    for fact in (compiler, " ".join(_FLAGS), torch.__version__, _cpu_model()):
        key.update(f"\0{fact}".encode())
    directory = cache_root() / "kernels"
    target = directory / f"{key.hexdigest()[:24]}.so"
    if target.is_file():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        out = Path(scratch) / target.name
        command = [compiler, *_FLAGS, "-o", str(out), *map(str, sources), *_openmp_link_flags()]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        out.replace(target)
    return target


def _openmp_link_flags() -> list[str]:
    """Link torch's libgomp by its path, if it carries one; its name then resolves to the copy that torch has loaded."""
    libraries = Path(torch.__file__).parent / "lib"
    own = sorted(libraries.glob("libgomp*.so*"))
    return [str(own[0]), f"-Wl,-rpath,{libraries}"] if own else []


def _cpu_model() -> str:
    """What -march=native depends on: a cache on a shared home directory may serve different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
