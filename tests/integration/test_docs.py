"""The documents' commands and snippets, run as they stand there but for the placeholders.

tests/documents.py has the marks. Each server that the pages start is started once, and asked all that they ask it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from documents import PAGES, Block, blocks, marked
from serving import REPOSITORY, Server, free_port

BIN = Path(sys.executable).parent
VENV = REPOSITORY / ".venv"
NAMES = sorted({block.mark.removeprefix("starts ") for block in marked("starts")})
BETWEEN = "---- the block that is tested ----"


@pytest.fixture(scope="module")
def places(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the value of each placeholder in the documents."""
    scratch = tmp_path_factory.mktemp("docs")
    for name, source in (("sql", "sql"), ("support", "pirate")):
        shutil.copytree(REPOSITORY / "examples" / "adapters" / source, scratch / "adapters" / name)
    known = {
        "MODEL": str(demo_model),
        "/adapters": str(scratch / "adapters"),
        ".venv/bin": str(BIN),
    }
    for block in marked("file"):
        file = scratch / block.mark.removeprefix("file ")
        file.write_text(filled(block.text, known))
        known[file.name] = str(file)
    return known


def filled(text: str, places: dict[str, str]) -> str:
    """A command, or a snippet, with values in place of the placeholders."""
    for placeholder, value in places.items():
        text = re.sub(rf"(?<![\w/-]){re.escape(placeholder)}(?!\w)", value, text)
    return text


def programs(page: str, word: str) -> list[list[Block]]:
    """A page's blocks with such a mark. Those that run together are one list: commands, or Python up to them."""
    found: list[list[Block]] = []
    for block in blocks(page):
        if block.mark != word:
            continue
        if found and block.language == found[-1][-1].language == "python":
            found[-1].append(block)
        else:
            found.append([block])
    return found


def run(program: list[Block], places: dict[str, str]) -> list[str]:
    """Return the faults of a program's run; none if it runs as its page says."""
    texts = [filled(block.text, places) for block in program]
    if program[0].language == "bash":
        command = ["bash", "-e", "-c", texts[0].replace("curl ", "curl -sS --fail-with-body ")]
    else:
        command = [sys.executable, "-c", f"print({BETWEEN!r}, flush=True)\n".join(texts)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        return [f"{program[0]} ends with {done.returncode}:\n{done.stdout}\n{done.stderr}"]
    return [
        f"{block} prints\n{printed}\nand not\n{wanted}"
        for block, printed in zip(program, done.stdout.split(f"{BETWEEN}\n"), strict=True)
        if (wanted := what_it_prints(block)) is not None and printed.strip() != wanted.strip()
    ]


def what_it_prints(block: Block) -> str | None:
    """Return the output of a block as its page gives it; None if it gives none."""
    known = blocks(block.page)
    following = known[known.index(block) + 1 :][:1]
    return following[0].text if following and following[0].mark == "prints" else None


@contextmanager
def started(name: str, places: dict[str, str]) -> Iterator[Server]:
    """The server of that name, for as long as it is asked."""
    commands = {block.text for block in marked("starts") if block.mark == f"starts {name}"}
    (command,) = (text.replace("\\\n", " ") for text in commands)
    port = free_port()
    if name == "demo":
        words = [*shlex.split(command), f"PORT={port}"]
    else:
        words = [*shlex.split(filled(command, places)), "--port", str(port)]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    server = Server(port, process)
    try:
        server.wait_until_ready()
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        server.stop()
    assert not server.survivors()


def ask(server: Server, word: str, places: dict[str, str]) -> list[str]:
    """Return the faults of the pages' blocks for that server."""
    own = places | {"http://127.0.0.1:8000": server.url, "status\n": f"status --url {server.url}\n"}
    asked = [program for page in PAGES for program in programs(page, word)]
    assert asked, "a server that no page asks anything"
    return [problem for program in asked for problem in run(program, own)]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "demo"])
def test_a_server_of_the_pages_answers_what_they_ask(name: str, places: dict[str, str]) -> None:
    with started(name, places) as server:
        assert ask(server, f"asks {name}", places) == []


@pytest.mark.skipif(Path(sys.prefix) != VENV, reason="`make` uses .venv, and these tests run from elsewhere")
def test_make_demo_answers_what_the_pages_ask(places: dict[str, str]) -> None:
    with started("demo", places) as server:
        assert ask(server, "asks demo", places) == []
        assert answers(server) == answers_of_the_readme()


def answers_of_the_readme() -> dict[str, str]:
    """Adapter → its answer in the README's table."""
    return {model: answer for model, _, answer in table_of_the_readme() if model != "smollm2"}


def table_of_the_readme() -> Sequence[tuple[str, str, str]]:
    """(model, prompt, answer), with `the same` put in full."""
    readme = (REPOSITORY / "README.md").read_text()
    found: list[tuple[str, str, str]] = []
    for model, prompt, answer in re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", readme, re.MULTILINE)[1:]:
        found.append((model, found[-1][1] if prompt == "the same" else prompt.replace("<br>", "\n"), answer))
    assert [model for model, _, _ in found] == ["smollm2", "sql", "smollm2", "pirate", "smollm2", "json"]
    return found


def answers(server: Server) -> dict[str, str]:
    """Return the answers of the demo's adapters to the README's prompts."""
    return {model: server.chat(model, prompt) for model, prompt, _ in table_of_the_readme() if model != "smollm2"}


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.mark == "alone" for block in blocks(page))])
def test_what_needs_no_server_runs_by_itself(page: str, places: dict[str, str]) -> None:
    assert [problem for program in programs(page, "alone") for problem in run(program, places)] == []
