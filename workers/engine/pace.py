"""How long things take this engine: running means, for those who choose between workers.

Owns: the means. Leaves to others: measuring (loop.py, slot_loader.py), what follows (the gateway's router.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_WEIGHT = 0.1  # of the newest sample
_MIN_PROMPT_TOKENS = 16  # in a step whose time says something about prompts


@dataclass(frozen=True, slots=True)
class Pace:
    """Means, in seconds. The defaults stand for what has not been measured yet."""

    step_s: float = 0.03  # a step without prompts
    prompt_token_s: float = 0.0005  # more for each token of a prompt
    seat_s: float = 3.0  # from a request's start, or start anew, to its end
    host_load_s: float = 0.02  # from the host tier into a slot
    disk_load_s: float = 0.3  # from the disk into a slot


class PaceMeter:
    """One thread calls `book_*`; `pace` is a value that any thread may read."""

    def __init__(self) -> None:
        self.pace = Pace()
        self._measured: set[str] = set()

    def book_step(self, seconds: float, num_prompt_tokens: int) -> None:
        """num_prompt_tokens: all that the step computed but the one token of each request that has some already."""
        if num_prompt_tokens == 0:
            self._book("step_s", seconds)
        elif num_prompt_tokens >= _MIN_PROMPT_TOKENS:
            step_s = self.pace.step_s if "step_s" in self._measured else 0.0
            self._book("prompt_token_s", max(0.0, seconds - step_s) / num_prompt_tokens)

    def book_seat(self, seconds: float) -> None:
        self._book("seat_s", seconds)

    def book_load(self, seconds: float, *, from_disk: bool) -> None:
        self._book("disk_load_s" if from_disk else "host_load_s", seconds)

    def _book(self, name: str, seconds: float) -> None:
        mean = getattr(self.pace, name)
        if name in self._measured:
            seconds = mean + _WEIGHT * (seconds - mean)
        self._measured.add(name)
        self.pace = replace(self.pace, **{name: seconds})
