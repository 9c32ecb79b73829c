"""Watch for stuck requests: they wait, and nothing runs, loads or is read that could let them begin.

This is for our own mistakes: a request that can never run should not have been accepted.
"""

from __future__ import annotations

LOOK_AGAIN_S = 0.1  # until a step looks again, while requests wait and there is nothing to do for them
STUCK_S = 10.0  # until the one that has waited longest is ended


class StuckWatch:
    """One engine's. Times are the caller's."""

    def __init__(self, stuck_s: float = STUCK_S) -> None:
        self.stuck_s = stuck_s
        self._since: float | None = None  # the first idle step, one after the other

    def is_stuck(self, now: float, *, is_idle: bool) -> bool:
        """Return whether requests have waited through idle steps alone for `stuck_s`.

        is_idle: requests wait, and the step that has just ended found nothing to do for them.
        """
        if not is_idle:
            self._since = None
            return False
        if self._since is None:
            self._since = now
        return now >= self._since + self.stuck_s
