"""Python's switch interval: how long a thread keeps the interpreter lock while another waits for it.

For processes in which an event loop shares the lock with computing threads. With the default of 5 ms, an event loop
waits for each of two busy threads in turn at every event that wakes it up.
"""

from __future__ import annotations

import sys
from typing import Final

SWITCH_INTERVAL_S: Final = 0.0005


def shorten_switch_interval() -> None:
    """Shorten the interval of this process."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
