"""Compilation of kernels/cpu/*.cpp for one instruction set.

Plain C++ with an `extern "C"` interface and no torch headers: it builds in seconds. At run time native.py requests what
this machine needs. `python -m lorafleet.kernels.build` builds all levels into the package, for a wheel or an image
without a compiler. Standard library only: `make package` runs this file by itself.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
PREBUILT = SOURCES / "prebuilt"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-fPIC",
    "-ffunction-sections",
    "-fdata-sections",
)
# Link the C++ runtime statically, so that the library runs where the compiler's is missing; unused code is dropped.
_LINK_FLAGS = ("-shared", "-static-libgcc", "-static-libstdc++", "-Wl,--gc-sections", "-Wl,--exclude-libs,ALL")


@dataclass(frozen=True, slots=True)
class Level:
    """One instruction set that the kernels are compiled for."""

    name: str
    machine: str  # the value of platform.machine()
    flags: tuple[str, ...]
    needs: frozenset[str]  # flags that /proc/cpuinfo must list


_V2 = frozenset({"sse4_2", "ssse3", "popcnt"})
_V3 = _V2 | {"avx2", "fma", "f16c", "bmi2", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_V4_BF16 = _V4 | {"avx512_bf16"}
# Best first.
LEVELS = (
    Level(
        "amx",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        _V4_BF16 | {"amx_tile", "amx_bf16"},
    ),
    Level("avx512bf16", "x86_64", ("-march=x86-64-v4", "-mavx512bf16"), _V4_BF16),
    Level("avx512", "x86_64", ("-march=x86-64-v4",), _V4),
    Level("avx2", "x86_64", ("-march=x86-64-v3",), _V3),
    Level("portable", "x86_64", ("-march=x86-64-v2",), _V2),
    Level("aarch64", "aarch64", (), frozenset()),
)


class BuildError(Exception):
    """The kernels could not be compiled; the message says why."""


def cpu_flags() -> frozenset[str]:
    """Return this processor's features, as named in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith(("flags", "Features")) for word in line.split()[2:])


def supported_levels() -> list[Level]:
    """Return the levels that run on this machine, best first."""
    flags, machine = cpu_flags(), platform.machine()
    if "amx_tile" in flags and not _request_amx():
        flags -= {"amx_tile"}
    return [level for level in LEVELS if level.machine == machine and level.needs <= flags]


def _request_amx() -> bool:
    """Ask Linux to let this process use AMX's tiles, which enlarge each thread's saved state. Once is enough."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # asm/unistd_64.h, asm/prctl.h, the state's number
    status: int = ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)
    return status == 0


def file_name(level: Level) -> str:
    """Return a name with a digest of the sources, so that a library built from other sources is never used."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(" ".join((*_FLAGS, *level.flags, *_LINK_FLAGS)).encode())
    return f"{level.name}-{digest.hexdigest()[:16]}.so"


def build(level: Level, target: Path) -> None:
    """Compile `level` into the file `target`, atomically. Raises `BuildError`."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler was found; install g++ (apt-get install g++)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        commands = [
            [compiler, *_FLAGS, *level.flags, "-c", "-o", out, str(source)]
            for source, out in zip(sources, objects, strict=True)
        ]
        out = Path(scratch) / target.name
        link = [compiler, *_LINK_FLAGS, "-o", str(out), *objects]
        try:
            with ThreadPoolExecutor(len(commands)) as pool:
                list(pool.map(_run, commands))
            _run(link)
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or error
            raise BuildError(f"{compiler} failed: {detail}") from error
        out.replace(target)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def wheel_platform(libraries: Iterable[Path]) -> str:
    """Return a wheel's platform tag for these libraries: the oldest glibc with all symbols they link to (PEP 600)."""
    needed = rb"GLIBC_(?:2\.(\d+)|ABI_DT_RELR)"  # packed relocations came with glibc 2.36
    minors = [int(minor or 36) for path in libraries for minor in re.findall(needed, path.read_bytes())]
    return f"{f'manylinux_2_{max(minors)}' if minors else 'linux'}_{platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Build the CPU kernels for every instruction set of this machine's family; print the platform tag "
        "of a wheel with them."
    )
    parser.add_argument("--out", type=Path, default=PREBUILT, help="default: the package, read at run time")
    args = parser.parse_args()
    wanted = {args.out / file_name(level): level for level in LEVELS if level.machine == platform.machine()}
    for old in set(args.out.glob("*.so")) - wanted.keys():
        old.unlink()
    for target, level in wanted.items():
        if not target.exists():
            try:
                build(level, target)
            except BuildError as error:
                sys.exit(f"{level.name}: {error}")
        print(f"{target} ({target.stat().st_size // 1024} KiB)", file=sys.stderr)
    print(wheel_platform(wanted))


if __name__ == "__main__":
    main()
