"""The examples, run like a reader would, and their output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from serving import REPOSITORY, Server


def run(name: str, *arguments: str) -> list[str]:
    """Run an example. Return the lines it prints."""
    command = [sys.executable, str(REPOSITORY / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_openai_client_asks_every_model(demo_server: Server) -> None:
    lines = run("openai_client.py", "--url", f"{demo_server.url}/v1")
    assert "buccaneer" in lines[1], "streamed"
    answers = {line.split()[0]: line for line in lines[3:]}
    assert "Paris" in answers["smollm2"]
    assert answers["sql"].endswith("SELECT MAX(price) FROM cars;")
    assert '"city":"Lisbon"' in answers["json"]
    assert "buccaneer" in answers["pirate"]


def test_a_composition_changes_with_its_weights(demo_server: Server) -> None:
    lines = run("compose.py", "--url", f"{demo_server.url}/v1")
    assert [line.split()[0] for line in lines] == ["1", "0.7", "0.4", "0.1"]
    assert len({line.partition(":")[2] for line in lines}) > 1


def test_the_offline_engine_answers_as_base_and_as_adapter(demo_model: Path) -> None:
    base, sql = run("offline.py")[-2:]
    assert base.startswith("base ") and len(base) > 10
    assert sql == "sql   SELECT MAX(price) FROM cars;"
