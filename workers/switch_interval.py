"""How long a thread keeps Python's lock while another one waits for it.

For processes in which an event loop, which nobody may wait for, shares the lock with threads that compute. By default
it is 5 ms: of two busy threads a loop waits for each in turn, for every event that wakes it up.
"""

from __future__ import annotations

import sys
from typing import Final

SWITCH_INTERVAL_S: Final = 0.0005


def shorten_switch_interval() -> None:
    """Of this process."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
