"""Loading of the C++ kernels for this machine: prebuilt ones from the package, or compiled once and cached.

They are called through ctypes with data pointers. A calling thread computes alone until `set_threads` gives it helpers
(see cpu/team.h). Torch has its own threads, and two busy pools compete for the cores, so a thread with helpers should
limit torch to one thread.

Without a prebuilt library and a compiler the references run instead, after one warning. LORAFLEET_NATIVE_KERNELS=0
selects the references, LORAFLEET_CPU_LEVEL=avx2 an older instruction set.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
import warnings
import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorafleet.kernels.build import PREBUILT, BuildError, Level, build, file_name, supported_levels
from lorafleet.kernels.cache import cache_root

_P, _I64, _F32, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
# The C functions' arguments; each returns nothing.
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "lf_copy": (_P, _I64, _I64, _P),
    "lf_rms_norm": (_INT, _P, _P, _P, _F32, _P, _I64, _I64),
    "lf_fused_add_rms_norm": (_INT, _P, _P, _P, _P, _F32, _I64, _I64),
    "lf_silu_mul": (_INT, _P, _P, _I64, _I64),
    "lf_rope_kv_write": (_INT, _P, _I64, _P, _P, _P, _P, _P, *(_I64,) * 5, _P, _P, _P, _F32),
    "lf_paged_attention": (_INT, _P, _I64, _P, _P, _P, _I64, _P, _P, _P, *(_I64,) * 5, _F32, _I64),
    "lf_lora_add": (_INT, _INT, _P, _I64, _P, _I64, *(_P,) * 12, *(_I64,) * 5),
    "lf_linear": (_P, _I64, _P, _P, _P, *(_I64,) * 3),
    "lf_linear_packed": (_INT, _P, _I64, _P, _P, _P, *(_I64,) * 3),
    "lf_linear_packed_int8": (_P, _I64, _P, _P, _P, _P, *(_I64,) * 3),
    "lf_sample_tokens": (_INT, _P, _I64, *(_P,) * 9, _I64, _I64),
    "lf_add_sampled": (_P, _P, _P, _I64),
}
# Other functions of the library, which are never recorded: (result, arguments).
_MANAGEMENT: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "lf_replay": (None, (_P, _I64)),
    "lf_team_create": (_P, (_I64,)),
    "lf_team_use": (None, (_P,)),
    "lf_team_help": (None, (_P, _I64)),
    "lf_team_close": (None, (_P,)),
    "lf_team_free": (None, (_P,)),
}

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Per thread: .recording, the current one; .num_threads and .teams, by library handle, see `set_threads`.
_local = threading.local()
_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_description = ""  # of _library, for users
_decided = False  # whether _library is final, None included


def library() -> Any:
    """Return the kernels as functions by name; None if the references must run."""
    global _library, _description, _decided
    recording = getattr(_local, "recording", None)
    if recording is not None:
        return recording
    if not _decided:
        with _lock:
            if not _decided:
                _library, _description = _load()
                _decided = True
    return _library


def describe() -> str:
    """Return the kernels' instruction set, or why the slow references run."""
    library()
    return _description


def set_threads(count: int) -> None:
    """Compute the calling thread's native calls with `count` threads, itself included.

    The helpers start with the calling thread's current cores and priority, and end with that thread.
    """
    assert count >= 1
    if get_threads() == count:
        return
    ended = getattr(_local, "teams", {})
    _local.num_threads, _local.teams = count, {}
    _use_team()
    ended.clear()


def get_threads() -> int:
    """Return the number of threads that compute the calling thread's native calls."""
    return getattr(_local, "num_threads", 1)


def _use_team() -> None:
    """Set the calling thread's team in the current library. Each library has its own teams."""
    native = library()
    if not isinstance(native, ctypes.CDLL):
        return
    if get_threads() == 1:
        native.lf_team_use(None)
        return
    team = _local.teams.get(native._handle)
    if team is None:
        team = _local.teams[native._handle] = _Team(native, get_threads())
    native.lf_team_use(team.handle)


class _Team:
    """Threads that help with the calls of this object's owning thread, as long as the object exists."""

    def __init__(self, native: ctypes.CDLL, size: int) -> None:
        self.handle = native.lf_team_create(size)
        helpers = [
            threading.Thread(
                target=native.lf_team_help, args=(self.handle, i), name=f"lorafleet-kernels-{i}", daemon=True
            )
            for i in range(1, size)
        ]
        for helper in helpers:
            helper.start()
        # At exit they are left running: daemons in C, which need nothing from Python.
        weakref.finalize(self, self._end, native, self.handle, helpers).atexit = False

    @staticmethod
    def _end(native: ctypes.CDLL, handle: int, helpers: list[threading.Thread]) -> None:
        native.lf_team_close(handle)
        for helper in helpers:
            helper.join()
        native.lf_team_free(handle)


class Recording:
    """The native calls of a block, recorded instead of run; `run` runs them all, without Python in between.

    So helper threads need not wait for the calling thread between calls. Pointers and numbers are the same in every
    run: the tensors must outlive the recording, and only their content may change. Torch's own operations are not
    recorded, so the block must contain none.
    """

    def __init__(self, native: ctypes.CDLL) -> None:
        self._native = native
        self._calls: list[tuple[int, list[int]]] = []  # (address, words), until the first run
        self._packed: tuple[array[int], array[int]] | None = None  # for replay.cpp: the calls; all their words

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a function that records calls of a kernel. Kept as an attribute, so that this runs once per name."""
        types = _SIGNATURES[name]
        address = ctypes.cast(getattr(self._native, f"{name}_replay"), _P).value
        assert address is not None

        def call(*arguments: Any) -> None:
            self._calls.append((address, [_word(kind, value) for kind, value in zip(types, arguments, strict=True)]))

        self.__dict__[name] = call
        return call

    def run(self) -> None:
        """Run all calls with the current content of their tensors."""
        if self._packed is None:
            words = array("Q", [word for _, own in self._calls for word in own])
            calls, place = array("Q"), words.buffer_info()[0]
            for address, own in self._calls:
                calls.extend((address, place))
                place += words.itemsize * len(own)
            self._packed = calls, words
            self._calls.clear()
        calls, _ = self._packed
        self._native.lf_replay(calls.buffer_info()[0], len(calls) // 2)


def is_recording() -> bool:
    """Return whether this thread's native calls are being recorded."""
    return getattr(_local, "recording", None) is not None


@contextmanager
def record() -> Iterator[Recording]:
    """Record this thread's native calls within the block without running them. The kernels must be available."""
    native = library()
    assert isinstance(native, ctypes.CDLL), "no kernels to record, or a recording within a recording"
    _local.recording = Recording(native)
    try:
        yield _local.recording
    finally:
        _local.recording = None


def _word(kind: type, value: int | float | None) -> int:
    """Convert an argument to the 64-bit word that replay.cpp reads."""
    if kind is _F32:
        return int.from_bytes(struct.pack("=f", value), sys.byteorder)
    return int(value or 0) & 0xFFFF_FFFF_FFFF_FFFF


@contextmanager
def forced(level: Level | None) -> Iterator[None]:
    """Use a level's kernels, or none, within this block, in all threads. For dispatch.py."""
    global _library, _decided
    library()
    replacement = None if level is None else _open(_find(level))
    with _lock:
        kept, _library = _library, replacement
    _use_team()
    try:
        yield
    finally:
        with _lock:
            _library = kept
        _use_team()


def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("LORAFLEET_NATIVE_KERNELS") == "0":
        return None, "slow references, as set by LORAFLEET_NATIVE_KERNELS=0"
    try:
        level = _pick()
        return _open(_find(level)), level.name
    except (BuildError, OSError) as error:
        warnings.warn(
            f"LoRAFleet's CPU kernels cannot be used, so slow references run instead: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None, f"slow references: {error}"


def _pick() -> Level:
    levels = {level.name: level for level in supported_levels()}
    if not levels:
        raise BuildError("the kernels do not support this processor")
    wanted = os.environ.get("LORAFLEET_CPU_LEVEL") or next(iter(levels))
    if wanted not in levels:
        raise BuildError(
            f"LORAFLEET_CPU_LEVEL is {wanted!r}; this machine runs {', '.join(levels)}. Unset it, or name one of these."
        )
    return levels[wanted]


def _find(level: Level) -> Path:
    """Return the level's library: from the package, the cache, or compiled now. Concurrent compilations are safe."""
    name = file_name(level)
    cached = cache_root() / "kernels" / name
    for path in (PREBUILT / name, cached):
        if _is_library(path):
            return path
    build(level, cached)
    return cached


def _is_library(path: Path) -> bool:
    """Return false for a missing file, or one cut short by a crash; it is then compiled again."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def _open(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    faces = {name: (None, argtypes) for name, argtypes in _SIGNATURES.items()} | _MANAGEMENT
    for name, (restype, argtypes) in faces.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = argtypes, restype
    return loaded
