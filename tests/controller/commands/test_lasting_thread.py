"""A thread for calls that may never return."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from lorafleet.controller.commands.lasting_thread import LastingThread


def test_it_does_one_thing_after_the_other_on_one_thread_until_it_is_ended() -> None:
    thread = LastingThread("t")
    idents = [thread.submit(threading.get_ident) for _ in range(3)]
    assert len({ident.result(10) for ident in idents}) == 1
    failing = thread.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(10)
    thread.end()
    assert not any(alive.name == "t" for alive in threading.enumerate())


def test_a_call_that_never_returns_keeps_no_process_from_ending() -> None:
    program = (
        "import threading\nfrom lorafleet.controller.commands.lasting_thread import LastingThread\n"
        "LastingThread('t').submit(threading.Event().wait)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
