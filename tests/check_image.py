"""Checks the image without a Docker engine. Run by `make image-check`; tests/deploy also runs the quick half.

    python tests/check_image.py

First `problems` checks the Dockerfile itself. Then its steps are run, with only the files that its COPY instructions
take, in an environment with only PATH, HOME and the settings that this machine's pip needs to find packages. Then the
installed program is tried without a compiler, as a user who may write nowhere. Not tried: the base images, and Docker's
own part (layers, mounts, users).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from string import Template
from typing import Any

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "deploy" / "docker"
VARIANTS = ("cpu", "cuda")
USER = 10001
# Commands that RUN may use besides our scripts. They create the user and an empty folder, which no step needs.
TRIVIAL = ("groupadd", "useradd", "install")
# The first one with the base images' Python is used. The system's can be used by any user.
PATHS = ("/usr/bin:/bin", f"{sys.base_prefix}/bin:/usr/bin:/bin")
# This machine's settings for pip's sources; hashes are checked whatever pip finds.
PIP_SETTINGS = ("cert", "default-timeout", "find-links", "index-url")
KERNELS = """
import pathlib, warnings
warnings.simplefilter("error")
from lorafleet.kernels import build, native
loaded = pathlib.Path(native.library()._name)
assert loaded.parent == build.PREBUILT, loaded
print(native.describe())
"""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: for RUN --mount=... sh x.sh, the flag and the text after it."""

    keyword: str
    flags: tuple[str, ...]
    text: str

    def flag(self, name: str) -> str | None:
        return next((flag.partition("=")[2] for flag in self.flags if flag.startswith(f"--{name}=")), None)


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: the instructions after a FROM."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def parse(dockerfile: str, variant: str) -> list[Stage]:
    """Return the stages, with ARGs replaced. Covers only what our Dockerfile uses: no heredocs, no ONBUILD."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    outside: dict[str, str] = {}  # ARGs before the first FROM: FROM sees them, a stage those that it names again
    inside: dict[str, str] = {}
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        keyword, _, rest = line.partition(" ")
        words = rest.split()
        flags = tuple(takewhile(lambda word: word.startswith("--"), words))
        scope = outside if keyword == "FROM" else inside
        text = Template(" ".join(words[len(flags) :])).safe_substitute(scope)
        if keyword == "ARG" and not stages:
            name, _, default = text.partition("=")
            outside[name] = variant if name == "VARIANT" else default
        elif keyword == "ARG":
            inside[text] = outside[text]
        elif keyword == "FROM":
            base, _, name = text.partition(" AS ")
            stages.append(Stage(name, base))
            inside = {}
        else:
            stages[-1].instructions.append(Instruction(keyword, flags, text))
    return stages


def commands(run: Instruction) -> list[list[str]]:
    return [shlex.split(command) for command in run.text.split("&&")]


def options(mount: str) -> dict[str, str]:
    """Return the options of --mount=type=bind,from=... by name."""
    return dict(option.split("=", 1) for option in mount.partition("=")[2].split(","))


def in_context(path: str, dockerignore: str) -> bool:
    """Return whether Docker sends a file to the builder: the last pattern that matches it or a folder above decides."""
    sent = True
    for line in dockerignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        exception = pattern.startswith("!")
        # ** matches any folders, * anything within one name.
        parts = re.split(r"(\*\*/|\*)", pattern.lstrip("!"))
        regex = "".join({"**/": "(?:.*/)?", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts)
        if re.fullmatch(f"{regex}(?:/.*)?", path):
            sent = exception
    return sent


def problems(dockerfile: str, dockerignore: str, variant: str) -> Iterator[str]:
    """Return a line for each promise of the image that a Dockerfile breaks."""
    stages = parse(dockerfile, variant)
    names = [stage.name for stage in stages]
    for number, stage in enumerate(stages):
        if stage.base not in names[:number] and not re.search(r"@sha256:[0-9a-f]{64}$", stage.base):
            yield f"{stage.name}: the base {stage.base} is not pinned by a digest"
        for instruction in stage.instructions:
            if instruction.keyword in ("ADD", "VOLUME"):
                yield f"{stage.name}: {instruction.keyword} is not to be used"
            elif instruction.keyword == "COPY" and instruction.flag("from") is None:
                for source in instruction.text.split()[:-1]:
                    if not (ROOT / source).exists():
                        yield f"{stage.name}: {source} is not there to be copied"
                    elif not in_context(source, dockerignore):
                        yield f"{stage.name}: .dockerignore keeps {source} out"
            elif instruction.keyword == "COPY" and instruction.flag("from") not in names[:number]:
                yield f"{stage.name}: no stage {instruction.flag('from')} to copy from"
            elif instruction.keyword == "RUN":
                mounted = [options(mount)["from"] for mount in instruction.flags]
                yield from (f"{stage.name}: no stage {it} to mount from" for it in mounted if it not in names[:number])
                for words in commands(instruction):
                    if not _is_ours(words) and words[0] not in TRIVIAL:
                        yield f"{stage.name}: what `{shlex.join(words)}` does is checked nowhere"
    yield from _final_problems(stages[-1])
    for script in sorted(DOCKER.glob("*.sh")):
        calls = [line for line in script.read_text().splitlines() if "-m pip" in line]
        if not all("--no-cache-dir" in call for call in calls):
            yield f"{script.name}: pip leaves its cache in the image"


def _is_ours(words: list[str]) -> bool:
    return (
        words[0] == "sh"
        and len(words) > 1
        and Path(words[1]).parent == Path("/steps")
        and (DOCKER / Path(words[1]).name).is_file()
    )


def _final_problems(stage: Stage) -> Iterator[str]:
    last = {instruction.keyword: instruction.text for instruction in stage.instructions}
    if "-slim" not in stage.base:
        yield f"{stage.name}: the base {stage.base} may have a compiler"
    if not re.fullmatch(r"[1-9]\d{4,}:[1-9]\d{4,}", last.get("USER", "")):
        yield f"{stage.name}: USER is not a number of 10000 or more, with a group"
    if json.loads(last.get("ENTRYPOINT", "[]")) != ["lorafleet"]:
        yield f"{stage.name}: ENTRYPOINT is not lorafleet"


class Steps:
    """Runs a Dockerfile below a folder that stands for every stage's root.

    One folder is enough since a path means the same in each stage, which is asserted: so files copied or mounted from
    an earlier stage are there already.
    """

    def __init__(self, root: Path, dockerignore: str, env: Mapping[str, str]) -> None:
        self.root = root
        self._dockerignore = dockerignore
        self._env = dict(env)
        self._workdir = root
        self.env: dict[str, str] = {}  # the last stage's ENV, with paths below the root

    def path(self, absolute: str) -> Path:
        return self.root / absolute.lstrip("/")

    def carry_out(self, stages: list[Stage]) -> None:
        for stage in stages:
            self.env = {}
            for instruction in stage.instructions:
                match instruction.keyword:
                    case "WORKDIR":
                        self._workdir = self.path(instruction.text)
                        self._workdir.mkdir(parents=True, exist_ok=True)
                    case "COPY":
                        self._copy(instruction)
                    case "RUN":
                        self._run(stage, instruction)
                    case "ENV":
                        for name, value in (word.split("=", 1) for word in shlex.split(instruction.text)):
                            self.env[name] = re.sub(r"(?:^|(?<=:))/", f"{self.root}/", value)

    def _copy(self, copy: Instruction) -> None:
        *sources, target = copy.text.split()
        if copy.flag("from") is not None:
            assert sources == [target], f"{target} is not at the same place in {copy.flag('from')}"
            return
        folder = self.path(target) if target.startswith("/") else self._workdir / target
        for source in sources:
            if (ROOT / source).is_file():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, folder)
            else:
                shutil.copytree(ROOT / source, folder, ignore=self._ignored, dirs_exist_ok=True)

    def _ignored(self, folder: str, names: list[str]) -> list[str]:
        relative = Path(folder).relative_to(ROOT)
        return [name for name in names if not in_context(str(relative / name), self._dockerignore)]

    def _run(self, stage: Stage, run: Instruction) -> None:
        for mount in run.flags:
            assert options(mount)["source"] == options(mount)["target"], f"{mount}: not at the same place"
        for words in commands(run):
            if not _is_ours(words):
                print(f"{stage.name}: left out: {shlex.join(words)}")
                continue
            mapped = [str(self.path(word)) if word.startswith("/") else word for word in words]
            started = time.monotonic()
            done = subprocess.run(
                mapped, cwd=self._workdir, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            if done.returncode:
                sys.exit(f"{done.stdout}\n{stage.name}: {shlex.join(words)}: exit status {done.returncode}")
            print(f"{stage.name}: {shlex.join(words)}: {time.monotonic() - started:.0f} s")
            print("".join(f"    {line}\n" for line in done.stdout.splitlines() if "/torch-" in line), end="")


def try_out(steps: Steps, scratch: Path) -> None:
    """Check that the wheel is whole, and the installed program starts and loads its kernels without a compiler."""
    (wheel,) = steps.path("/dist").glob("*.whl")
    python = steps.path("/opt/lorafleet/venv/bin/python")
    alone = scratch / "wheel"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-cache-dir", "--target", alone, wheel], env={"PATH": ""}, check=True)
    subprocess.run([python, "-P", ROOT / "tests" / "check_wheel.py", alone], env={"PATH": ""}, check=True)

    home = steps.path(steps.env["HOME"].removeprefix(str(steps.root)))
    for folder in (home, steps.path("/cache")):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o555)
    # No /usr/bin after it: no compiler, nor anything else that the image might lack.
    env = steps.env | {"PATH": steps.env["PATH"].split(":")[0]}
    other_user: dict[str, Any] = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
    try:
        subprocess.run([python, "-c", ""], env={"PATH": ""}, check=True, **other_user)
    except PermissionError:  # not root, or the interpreter lies in a home directory
        other_user = {}
    if not other_user:
        print("tried as the user who installed it, who may write to it")
    for command in (["lorafleet", "--version"], ["lorafleet", "--help"], ["python", "-c", KERNELS]):
        program = shutil.which(command[0], path=env["PATH"])
        assert program is not None, f"{command[0]} is not installed"
        done = subprocess.run(
            [program, *command[1:]], cwd="/", env=env, stdout=subprocess.PIPE, text=True, check=True, **other_user
        )
        print(f"{shlex.join(command[:2])}: {done.stdout.splitlines()[0]}")
    written = [path for folder in (home, steps.path("/cache")) for path in folder.rglob("*")]
    assert written == [], f"written without need: {written}"
    print(f"the environment has {size(steps.path('/opt/lorafleet/venv')) / 2**20:.0f} MiB")


def pip_settings() -> dict[str, str]:
    """Return this machine's pip settings, from its files and environment, as environment variables."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    listed = subprocess.run([*pip, "config", "list"], stdout=subprocess.PIPE, text=True, check=True).stdout
    settings = dict(re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    return {f"PIP_{name.upper().replace('-', '_')}": settings[name] for name in PIP_SETTINGS if name in settings}


def has_python(path: str) -> bool:
    """Return whether its python3 has the locks' version and can create environments."""
    program = shutil.which("python3", path=path)
    test = "import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))"
    return program is not None and subprocess.run([program, "-c", test], stderr=subprocess.DEVNULL).returncode == 0


def size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def main() -> None:
    dockerfile, dockerignore = (DOCKER / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text()
    found = {problem: None for variant in VARIANTS for problem in problems(dockerfile, dockerignore, variant)}
    if found:
        sys.exit("\n".join(found))
    settings = pip_settings()
    print("beside PATH and HOME the steps are given", settings or "nothing")
    with tempfile.TemporaryDirectory(prefix="lorafleet-image-") as name:
        scratch = Path(name)
        scratch.chmod(0o755)  # readable for the other user
        home = scratch / "home"
        home.mkdir()
        # This machine's pip.conf does not count. One retry, since PyTorch's server may be unreachable where
        # PIP_FIND_LINKS has the file.
        path = next(filter(has_python, PATHS), None)
        if path is None:
            print(f"skipped: the locks are for Python 3.11 with venv, which is in none of {PATHS}")
            return
        env = {"PATH": path, "HOME": str(home), "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1"} | settings
        steps = Steps(scratch / "root", dockerignore, env)
        steps.carry_out(parse(dockerfile, "cpu"))
        assert list(home.iterdir()) == [], f"the steps left {list(home.iterdir())} in the home directory"
        try_out(steps, scratch)


if __name__ == "__main__":
    main()
