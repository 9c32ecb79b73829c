"""Signals that arrive while one is being handled."""

from __future__ import annotations

import subprocess
import sys

FLOOD = """
import os, signal, threading, time
from lorafleet.controller.commands.signals import Signals, Stopped

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


HANGUP = """
import os, signal, sys
from lorafleet.controller.commands.signals import Signals

if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
signals = Signals()
signals.install()
os.kill(os.getpid(), signal.SIGHUP)
sys.exit(signals.count)
"""


def test_a_terminal_that_is_closed_asks_for_the_end_unless_nohup_says_otherwise() -> None:
    for how, count in (("plain", 1), ("nohup", 0)):
        assert subprocess.run([sys.executable, "-c", HANGUP, how], timeout=60, check=False).returncode == count
