"""The pace of this engine: running means of its durations, used for routing.

A mean without recent samples is withheld: a worker that was slow once would get no requests, so nothing would ever
correct it.

Owns: the means. Leaves to others: measuring (engine/loop.py, engine/slot_loader.py), routing (the gateway's router.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_WEIGHT = 0.1  # weight of the newest sample
_MIN_PROMPT_TOKENS = 16  # fewest in a step that is counted for prompts
_STEP_COUNTS_FOR_S = 10.0
_REST_COUNTS_FOR_S = 60.0  # longer, since seats and loads are rarer than steps


@dataclass(frozen=True, slots=True)
class Pace:
    """Means, in seconds; 0: not measured recently."""

    step_s: float = 0.0  # a step without prompts
    prompt_token_s: float = 0.0  # additional time for each prompt token
    seat_s: float = 0.0  # from a request's start, or its resumption, to its end
    host_load_s: float = 0.0  # from the host tier into a slot
    disk_load_s: float = 0.0  # from the disk into the host tier; `host_load_s` comes on top


class PaceMeter:
    """Measures the pace. One thread calls `book_*`; any thread may read `pace`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._means: dict[str, tuple[float, float]] = {}  # name → mean, when it changed last

    def pace(self) -> Pace:
        """Return the means that still count."""
        now = self._clock()
        return Pace(**{name: mean for name, (mean, at) in list(self._means.items()) if now - at < _counts_for_s(name)})

    def book_step(self, seconds: float, num_prompt_tokens: int) -> None:
        """num_prompt_tokens: tokens the step computed, without one for each request that already had output."""
        if num_prompt_tokens == 0:
            self._book("step_s", seconds)
        elif num_prompt_tokens >= _MIN_PROMPT_TOKENS:
            step_s, _ = self._means.get("step_s", (0.0, 0.0))
            self._book("prompt_token_s", max(0.0, seconds - step_s) / num_prompt_tokens)

    def book_seat(self, seconds: float) -> None:
        self._book("seat_s", seconds)

    def book_load(self, seconds: float, *, from_disk: bool) -> None:
        self._book("disk_load_s" if from_disk else "host_load_s", seconds)

    def _book(self, name: str, seconds: float) -> None:
        now = self._clock()
        if name in self._means:
            mean, at = self._means[name]
            if now - at < _counts_for_s(name):
                seconds = mean + _WEIGHT * (seconds - mean)
        self._means[name] = seconds, now


def _counts_for_s(name: str) -> float:
    return _STEP_COUNTS_FOR_S if name in ("step_s", "prompt_token_s") else _REST_COUNTS_FOR_S
