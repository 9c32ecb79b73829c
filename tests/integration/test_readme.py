"""The README's commands and snippets, run as they stand there but for the placeholders."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serving import REPOSITORY, Server, free_port

README = (REPOSITORY / "README.md").read_text()
VENV = REPOSITORY / ".venv"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block_with(language: str, text: str) -> str:
    (found,) = [block for block in blocks(language) if text in block]
    return found


def spawn(command: list[str], port: int) -> Server:
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    return Server(port, process)


@pytest.mark.skipif(Path(sys.prefix) != VENV, reason="`make` uses .venv, and these tests run from elsewhere")
def test_make_demo_and_the_openai_snippet(demo_model: Path) -> None:
    assert blocks("bash")[:2] == ["make demo\n", "make test\n"], "the first things in the README"
    port = free_port()
    server = spawn(["make", "demo", f"PORT={port}"], port)
    try:
        server.wait_until_ready()
        snippet = block_with("python", "from openai import OpenAI").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        result = subprocess.run(
            [sys.executable, "-c", snippet], capture_output=True, text=True, timeout=120, check=True
        )
        assert result.stdout.strip() == "SELECT MAX(price) FROM cars;"
    finally:
        # As Ctrl-C in a terminal: to make and to the server.
        os.killpg(server.process.pid, signal.SIGINT)
        server.stop()
    assert not server.survivors()


def test_the_serve_command(demo_model: Path) -> None:
    command = block_with("bash", "lorafleet serve")
    adapters = REPOSITORY / "examples" / "adapters"
    for placeholder, value in (
        (".venv/bin/lorafleet", str(Path(sys.executable).parent / "lorafleet")),
        ("MODEL", str(demo_model)),
        ("/path/to/adapter", str(adapters / "sql")),
        ("org/name", str(adapters / "pirate")),
    ):
        assert placeholder in command
        command = command.replace(placeholder, value)
    port = free_port()
    updates = ["--allow-runtime-lora-updates", "--lora-root", str(adapters)]
    server = spawn([*shlex.split(command), *updates, "--port", str(port)], port)
    try:
        server.wait_until_ready()
        assert '"support"' in server.get("/v1/models")[1]
        curls = block_with("bash", "load_lora_adapter").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        assert "/adapters/sql2" in curls
        result = subprocess.run(
            ["bash", "-e", "-c", curls.replace("/adapters/sql2", str(adapters / "json")).replace("curl ", "curl -sf ")],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert result.stdout.count("Success") == 2
    finally:
        server.stop()


def test_the_offline_snippet(demo_model: Path) -> None:
    snippet = block_with("python", "from lorafleet.workers import LLM")
    adapter = str(REPOSITORY / "examples" / "adapters" / "sql")
    snippet = snippet.replace('"MODEL"', repr(str(demo_model))).replace('"/path/to/adapter"', repr(adapter))
    result = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
