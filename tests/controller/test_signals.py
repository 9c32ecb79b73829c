"""Signals that come while one is being handled."""

from __future__ import annotations

import subprocess
import sys

FLOOD = """
import os, signal, threading, time
from lorafleet.controller.signals import Signals, Stopped

signals = Signals()
signals.install()
pid = os.getpid()

def flood():
    while True:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)

threading.Thread(target=flood, daemon=True).start()
while signals.count < 1_000:
    try:
        signals.check()
    except Stopped:
        time.sleep(0)
os._exit(7)
"""


def test_signals_in_the_middle_of_handling_one_do_no_harm() -> None:
    assert subprocess.run([sys.executable, "-c", FLOOD], timeout=60, check=False).returncode == 7
