"""Choice of the kernels for a machine; compile errors, broken files and racing processes.

Compiled without optimisation, which takes one second instead of ten or more.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafleet.kernels import build, native
from lorafleet.kernels.build import LEVELS, BuildError, Level
from lorafleet.kernels.norm import rms_norm

FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in build._FLAGS)
WORST = build.supported_levels()[-1]
RESULT = torch.tensor([[0.6, 0.8]]) * 2**0.5  # the norm of (3, 4)
# Run in a process of its own; prints the kernels' file, whether they compute, and the warnings.
PROBE = f"""
import pathlib, sys, warnings, torch
from lorafleet.kernels import build, native
from lorafleet.kernels.norm import rms_norm
build._FLAGS = {FLAGS!r}
print("ready", flush=True)
sys.stdin.readline()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y = rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
torch.testing.assert_close(y, torch.tensor({RESULT.tolist()!r}))
library = native.library()
print("references" if library is None else pathlib.Path(library._name).name)
print(*(warning.message for warning in caught), sep="\\n")
"""


@pytest.fixture
def unoptimised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and quick builds into it. Returns the folder of the kernels."""
    native.library()  # decide this process's own first
    monkeypatch.setattr(build, "_FLAGS", FLAGS)
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the C++ sources that tests may change."""
    copy = tmp_path / "cpu"
    shutil.copytree(build.SOURCES, copy)
    monkeypatch.setattr(build, "SOURCES", copy)
    return copy


def probe(cache: Path, **environment: str) -> subprocess.Popen[str]:
    """Start PROBE; it continues when it gets a line."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LORAFLEET_")}
    return subprocess.Popen(
        [sys.executable, "-c", PROBE],
        env=inherited | {"LORAFLEET_CACHE": str(cache), "LORAFLEET_CPU_LEVEL": WORST.name} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> list[tuple[str, str]]:
    """Release all processes once all are ready; return (library's file name, warnings) of each."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[0].partition("\n") for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return [(file, warnings.strip()) for file, _, warnings in said]


def test_this_machine_has_levels_and_they_are_what_its_processor_can_do() -> None:
    levels = build.supported_levels()
    assert levels and all(level.needs <= build.cpu_flags() for level in levels)
    assert levels == [level for level in LEVELS if level in levels], "in the order of LEVELS"


def test_of_one_machine_each_level_needs_more_than_the_next() -> None:
    for better, lesser in itertools.pairwise(LEVELS):
        assert better.machine != lesser.machine or better.needs > lesser.needs


@pytest.mark.parametrize(
    ("machine", "flags", "names"),
    [
        ("x86_64", LEVELS[0].needs, ["amx", "avx512bf16", "avx512", "avx2", "portable"]),
        ("x86_64", LEVELS[0].needs - {"amx_bf16"}, ["avx512bf16", "avx512", "avx2", "portable"]),
        ("x86_64", LEVELS[0].needs - {"fma"}, ["portable"]),
        ("x86_64", LEVELS[3].needs | {"avx512f"}, ["avx2", "portable"]),
        ("x86_64", frozenset({"sse2"}), []),
        ("aarch64", frozenset({"asimd"}), ["aarch64"]),
        ("riscv64", frozenset(), []),
    ],
)
def test_a_processor_gets_the_levels_whose_needs_it_meets(
    machine: str, flags: frozenset[str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(build, "cpu_flags", lambda: flags)
    monkeypatch.setattr(build, "_request_amx", lambda: True)
    assert [level.name for level in build.supported_levels()] == names


def test_amx_is_not_offered_where_linux_does_not_permit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "cpu_flags", lambda: LEVELS[0].needs)
    monkeypatch.setattr(build, "_request_amx", lambda: False)
    assert build.supported_levels()[0].name == "avx512bf16"


def test_the_file_name_changes_with_the_sources_and_the_flags_and_with_nothing_else(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = build.file_name(WORST)
    (sources / "prebuilt").mkdir()
    (sources / "editor's.swp").write_text("not ours")
    assert build.file_name(WORST) == original
    names = {original} | {build.file_name(level) for level in LEVELS}
    assert len(names) == len(LEVELS)
    for path in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]):
        kept = path.read_bytes()
        path.write_bytes(kept + b"\n")
        names.add(build.file_name(WORST))
        path.write_bytes(kept)
    path.rename(path.with_name("other.h"))
    names.add(build.file_name(WORST))
    path.with_name("other.h").rename(path)
    monkeypatch.setattr(build, "_FLAGS", FLAGS)
    names.add(build.file_name(WORST))
    num_changes = len([*sources.glob("*.cpp"), *sources.glob("*.h")]) + 2
    assert len(names) == len(LEVELS) + num_changes


def test_a_compile_error_is_told_in_the_compilers_words_and_leaves_no_file(
    sources: Path, unoptimised: Path, tmp_path: Path
) -> None:
    (sources / "broken.cpp").write_text("int f() { return undeclared_name; }\n")
    with pytest.raises(BuildError, match=r"(?s)broken\.cpp:1:.*undeclared_name"):
        build.build(WORST, tmp_path / "out" / "kernels.so")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_link_error_is_told_and_leaves_no_file(
    unoptimised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_LINK_FLAGS", ("-shared", "-lno_such_library"))
    with pytest.raises(BuildError, match="no_such_library"):
        build.build(WORST, tmp_path / "out" / "kernels.so")
    assert list((tmp_path / "out").iterdir()) == []


def test_cxx_names_the_compiler(unoptimised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(BuildError, match=r"/nonexistent/c\+\+ failed: .*No such file"):
        build.build(WORST, tmp_path / "out" / "kernels.so")


@pytest.mark.parametrize("content", [b"", bytes(4096), b"not a library"])
def test_a_broken_library_in_the_cache_is_compiled_again(content: bytes, unoptimised: Path) -> None:
    unoptimised.mkdir(parents=True)
    path = unoptimised / build.file_name(WORST)
    path.write_bytes(content)
    with native.forced(WORST):
        torch.testing.assert_close(rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0), RESULT)
    assert [file.name for file in unoptimised.iterdir()] == [path.name]
    rebuilt = path.stat().st_mtime_ns
    with native.forced(WORST):
        pass
    assert path.stat().st_mtime_ns == rebuilt


def test_a_broken_library_and_no_compiler_give_one_warning_and_the_references(unoptimised: Path) -> None:
    unoptimised.mkdir(parents=True)
    (unoptimised / build.file_name(WORST)).write_bytes(b"not a library")
    ((file, warnings),) = finish(probe(unoptimised.parent, PATH="/nonexistent"))
    assert file == "references"
    assert re.fullmatch(r"LoRAFleet's CPU kernels cannot be used.*no C\+\+ compiler was found.*", warnings)


def test_processes_that_compile_at_the_same_time_all_get_a_working_library(unoptimised: Path) -> None:
    cache = unoptimised.parent
    name = build.file_name(WORST)
    assert finish(probe(cache), probe(cache)) == [(name, "")] * 2
    assert [file.name for file in unoptimised.iterdir()] == [name]


def test_an_unknown_level_gives_one_warning_with_the_levels_that_there_are(unoptimised: Path) -> None:
    ((file, warnings),) = finish(probe(unoptimised.parent, LORAFLEET_CPU_LEVEL="sse9"))
    assert file == "references"
    names = ", ".join(level.name for level in build.supported_levels())
    said = f"LORAFLEET_CPU_LEVEL is 'sse9'; this machine runs {names}. Unset it, or name one of these."
    assert re.fullmatch(rf"LoRAFleet's CPU kernels cannot be used.*: {re.escape(said)}", warnings)
    assert not unoptimised.exists(), "nothing is compiled for it"


def test_the_references_run_without_a_warning_when_they_are_asked_for(unoptimised: Path) -> None:
    assert finish(probe(unoptimised.parent, LORAFLEET_NATIVE_KERNELS="0")) == [("references", "")]
    assert not unoptimised.exists()


@pytest.mark.parametrize(
    ("contents", "tag"),
    [
        ([b"\0GLIBC_2.2.5\0GLIBC_2.14\0", b"\0GLIBC_2.9\0GLIBCXX_3.4.99\0"], "manylinux_2_14"),
        ([b"\0GLIBC_2.3\0GLIBC_ABI_DT_RELR\0"], "manylinux_2_36"),
        ([b"\0libc.musl\0"], "linux"),
        ([], "linux"),
    ],
)
def test_a_wheels_tag_names_the_glibc_that_its_libraries_need(contents: list[bytes], tag: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.so" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert build.wheel_platform(paths) == f"{tag}_{platform.machine()}"


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
def test_a_wheels_tag_is_what_objdump_reads(unoptimised: Path) -> None:
    path = unoptimised / "kernels.so"
    build.build(WORST, path)
    table = subprocess.run(["objdump", "-p", str(path)], capture_output=True, text=True, check=True, timeout=60).stdout
    newest = max(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", table))
    assert build.wheel_platform([path]) == f"manylinux_2_{newest}_{platform.machine()}"


def test_building_all_levels_builds_what_is_missing_and_removes_what_is_stale(
    unoptimised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[Level] = []

    def note(level: Level, target: Path) -> None:
        built.append(level)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"\0GLIBC_2.28\0")

    monkeypatch.setattr(build, "build", note)
    monkeypatch.setattr(sys, "argv", ["build", "--out", str(tmp_path / "out")])
    build.main()
    own = [level for level in LEVELS if level.machine == platform.machine()]
    assert built == own
    (tmp_path / "out" / "avx2-0123456789abcdef.so").touch()
    (tmp_path / "out" / build.file_name(WORST)).unlink()
    build.main()
    assert built == [*own, WORST]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {build.file_name(level) for level in own}
    assert capsys.readouterr().out == f"manylinux_2_28_{platform.machine()}\n" * 2
