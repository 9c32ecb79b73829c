"""The documents' commands and snippets, run as they stand there but for the placeholders.

tests/documents.py has the marks. Each server that the pages start is started once, and asked all that they ask it.
"""

from __future__ import annotations

import itertools
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
    """What stands for each placeholder of the documents."""
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


def programs(page: str, word: str) -> Iterator[tuple[Block, str, str | None]]:
    """Each block of a page with such a mark as a whole program, and what it is to print, if the page says so.

    A Python block goes on where those of the page before it ended.
    """
    before = ""
    known = blocks(page)
    for block, following in itertools.pairwise([*known, None]):
        assert block is not None
        if block.mark != word:
            continue
        prints = following.text if following is not None and following.mark == "prints" else None
        if block.language == "bash":
            yield block, block.text, prints
        else:
            yield block, f"{before}\nprint({BETWEEN!r}, flush=True)\n{block.text}", prints
            before += block.text


def run(block: Block, program: str, prints: str | None) -> str:
    """What is wrong with how a program runs; nothing if it runs as its page says."""
    if block.language == "bash":
        command = ["bash", "-e", "-c", program.replace("curl ", "curl -sS --fail-with-body ")]
    else:
        command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    printed = done.stdout.rpartition(f"{BETWEEN}\n")[2]
    if done.returncode:
        return f"{block} ends with {done.returncode}:\n{printed}\n{done.stderr}"
    if prints is not None and printed.strip() != prints.strip():
        return f"{block} prints\n{printed}\nand not\n{prints}"
    return ""


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
    """What is wrong with the pages' blocks for that server."""
    own = places | {"http://127.0.0.1:8000": server.url}
    asked = [program for page in PAGES for program in programs(page, word)]
    assert asked, f"a server that no page asks anything: {word}"
    problems = []
    for block, program, prints in asked:
        program = program.replace("lorafleet status\n", f"lorafleet status --url {server.url}\n")
        if problem := run(block, filled(program, own), prints):
            problems.append(problem)
    return problems


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
    """What the demo's adapters answer to the README's prompts."""
    return {model: server.chat(model, prompt) for model, prompt, _ in table_of_the_readme() if model != "smollm2"}


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.mark == "alone" for block in blocks(page))])
def test_what_needs_no_server_runs_by_itself(page: str, places: dict[str, str]) -> None:
    problems = [run(block, filled(program, places), prints) for block, program, prints in programs(page, "alone")]
    assert [problem for problem in problems if problem] == []
