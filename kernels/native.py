"""Loads the C++ kernels for this machine: prebuilt ones where the package carries them, else compiled once and cached.

They are called through ctypes with data pointers and use the OpenMP runtime that torch has loaded, so that
`torch.set_num_threads` in the calling thread governs them and no second pool of threads fights for the cores.

Without a prebuilt library and without a compiler the references run instead, after one warning.
LORAFLEET_NATIVE_KERNELS=0 asks for the references on purpose, LORAFLEET_CPU_LEVEL=avx2 for a lesser instruction set.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lorafleet.kernels.build import PREBUILT, BuildError, Level, build, file_name, supported_levels
from lorafleet.kernels.cache import cache_root

_P, _I64, _F32, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
# The C faces, argument by argument; each returns nothing.
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "lf_rms_norm": (_INT, _P, _P, _F32, _P, _I64, _I64),
    "lf_fused_add_rms_norm": (_INT, _P, _P, _P, _F32, _I64, _I64),
    "lf_silu_mul": (_INT, _P, _P, _I64, _I64),
    "lf_rope_kv_write": (_INT, _P, _I64, _P, _P, _P, _P, _P, *(_I64,) * 5, _P, _P, _F32),
    "lf_paged_attention": (_INT, _P, _I64, _P, _P, _P, _I64, _P, _P, _P, *(_I64,) * 5, _F32, _I64),
    "lf_lora_add": (_INT, _INT, _P, _I64, _P, _I64, *(_P,) * 9, *(_I64,) * 5),
    "lf_linear": (_P, _I64, _P, _P, _P, *(_I64,) * 3),
    "lf_linear_packed": (_P, _I64, _P, _P, _P, *(_I64,) * 3),
    "lf_linear_packed_int8": (_P, _I64, _P, _P, _P, _P, *(_I64,) * 3),
}

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_decided = False  # whether _library is final, None included


def library() -> ctypes.CDLL | None:
    """The kernels; None when the references are to run."""
    global _library, _decided
    if not _decided:
        with _lock:
            if not _decided:
                _library = None if os.environ.get("LORAFLEET_NATIVE_KERNELS") == "0" else _load()
                _decided = True
    return _library


@contextmanager
def forced(level: Level | None) -> Iterator[None]:
    """Run that level's kernels, or the references (None), within this block and in all threads. For tests."""
    global _library, _decided
    library()
    replacement = None if level is None else _open(_find(level))
    with _lock:
        kept, _library = _library, replacement
    try:
        yield
    finally:
        with _lock:
            _library = kept


def _load() -> ctypes.CDLL | None:
    try:
        return _open(_find(_pick()))
    except (BuildError, OSError) as error:
        warnings.warn(
            f"LoRAFleet's CPU kernels cannot be used, so slow references run instead: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def _pick() -> Level:
    levels = supported_levels()
    wanted = os.environ.get("LORAFLEET_CPU_LEVEL")
    if wanted:
        names = [level.name for level in levels]
        if wanted not in names:
            raise BuildError(f"LORAFLEET_CPU_LEVEL is {wanted!r}; this machine runs {', '.join(names) or 'none'}")
        return levels[names.index(wanted)]
    if not levels:
        raise BuildError("this processor is none of those that the kernels are written for")
    return levels[0]


def _find(level: Level) -> Path:
    """The level's library: in the package, in the cache, or compiled now. Several processes may compile; one wins."""
    name = file_name(level)
    cached = cache_root() / "kernels" / name
    for path in (PREBUILT / name, cached):
        if path.is_file():
            return path
    build(level, cached)
    return cached


def _open(path: Path) -> ctypes.CDLL:
    # The library names no OpenMP runtime: its symbols are found in what is loaded globally.
    ctypes.CDLL(_openmp_runtime(), mode=ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(str(path))
    for name, argtypes in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = argtypes, None
    return loaded


def _openmp_runtime() -> str:
    """The file of the OpenMP runtime that torch has loaded into this process."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/lib" in line}
    except OSError:
        mapped = set()
    runtimes = sorted(path for path in mapped if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))
    own = [path for path in runtimes if "torch" in path]
    found = next(iter(own or runtimes), None) or ctypes.util.find_library("gomp")
    if found is None:
        raise OSError("no OpenMP runtime is loaded or installed (libgomp.so.1)")
    return found
