"""A watched process is killed when it is stopped or its loop hangs, and not otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, sys, time
from lorafleet.controller.fleet.watchdog import under_watch

async def main():
    watched = asyncio.create_task(under_watch(silent_s=float(sys.argv[1])))
    await asyncio.sleep(0.5)
    print("runs", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        if line == "hang\\n":
            time.sleep(600)
        print("does", flush=True)
    watched.cancel()
    await asyncio.gather(watched, return_exceptions=True)

asyncio.run(main())
"""


@pytest.fixture(params=[2.0])
def watched(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(request.param)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "runs\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def watchdogs(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ask(watched: subprocess.Popen[str], line: str) -> str:
    assert watched.stdin is not None and watched.stdout is not None
    watched.stdin.write(f"{line}\n")
    return watched.stdout.readline()


def test_a_stopped_process_is_ended(watched: subprocess.Popen[str]) -> None:
    os.kill(watched.pid, signal.SIGSTOP)
    assert watched.wait(30) == -signal.SIGKILL


def test_a_process_whose_loop_hangs_is_ended(watched: subprocess.Popen[str]) -> None:
    assert ask(watched, "hang") == ""
    assert watched.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize("watched", [30.0], indirect=True)  # long, so that a busy machine does not matter
def test_a_running_process_is_not_killed_and_its_watchdog_ends_with_it(watched: subprocess.Popen[str]) -> None:
    (watchdog,) = watchdogs(watched.pid)
    os.kill(watchdog, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while watchdogs(watched.pid) in ([], [watchdog]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ask(watched, "anything") == "does\n"
    (another,) = watchdogs(watched.pid)
    assert watched.stdin is not None
    watched.stdin.close()
    assert watched.wait(30) == 0
    assert not Path(f"/proc/{another}").exists()
