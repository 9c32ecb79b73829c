"""A config's regular expressions matched with the base model's modules, as PEFT does, in bounded time.

A regular expression can run forever while holding Python's lock. So one with repetitions, choices or groups is matched
in a process of its own (pattern_process.py), which the system kills at its limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lorafleet.workers.errors import quoted

MAX_PATTERNS: Final = 2048
MAX_CHARS: Final = 1000  # per pattern
MAX_TOTAL_CHARS: Final = 256 << 10
CPU_S: Final = 3
_WALL_S = 60.0
# Nothing in it can repeat or branch, so matching takes linear time.
_PLAIN = re.compile(r"(?:[\w.^$-]|\\[.dDwWsS])*", re.ASCII)
_PROCESS = Path(__file__).with_name("pattern_process.py")


class PatternError(ValueError):
    """An error in a pattern. Its text is the rest of a sentence."""


def first_matches(patterns: Sequence[str], modules: Sequence[str]) -> dict[str, int]:
    """Return the index of the first pattern that matches each module; unmatched modules are left out.

    A pattern matches the end of a module's name: whole names between dots, or a regular expression.
    Raises `PatternError`.
    """
    if len(patterns) > MAX_PATTERNS or sum(map(len, patterns)) > MAX_TOTAL_CHARS:
        raise PatternError(
            f"with {len(patterns):,} patterns; the limits are {MAX_PATTERNS:,} patterns and {MAX_TOTAL_CHARS:,} "
            "characters in all"
        )
    for pattern in patterns:
        if len(pattern) > MAX_CHARS:
            raise PatternError(f"for {quoted(pattern)}, which is longer than {MAX_CHARS:,} characters, the limit")
    expressions = [rf"(.*\.)?({pattern})$" for pattern in patterns]
    plain = [number for number, pattern in enumerate(patterns) if _PLAIN.fullmatch(pattern)]
    first: dict[str, int] = {}
    for number in plain:
        match = re.compile(expressions[number]).match
        for module in modules:
            if module not in first and match(module):
                first[module] = number
    others = sorted(set(range(len(patterns))) - set(plain))
    if others:
        found = _match_apart([expressions[number] for number in others], modules, [patterns[i] for i in others])
        for module, position in found.items():
            first[module] = min(first.get(module, len(patterns)), others[position])
    return first


def _match_apart(expressions: Sequence[str], modules: Sequence[str], patterns: Sequence[str]) -> dict[str, int]:
    """Do the same in a process of its own. patterns: the expressions' names in an error."""
    task = json.dumps({"cpu_s": CPU_S, "expressions": expressions, "modules": modules})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_PROCESS)], input=task.encode(), capture_output=True, timeout=_WALL_S
        )
    except subprocess.TimeoutExpired as error:
        raise _too_slow(patterns) from error
    except OSError as error:
        raise PatternError(f"that cannot be matched now: {error.strerror}") from error
    if done.returncode:
        raise _too_slow(patterns)
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise PatternError(f"for {quoted(patterns[answer['number']])}, not a regular expression: {answer['error']}")
    first: dict[str, int] = answer["first"]
    return first


def _too_slow(patterns: Sequence[str]) -> PatternError:
    return PatternError(
        f"that takes longer than {CPU_S} s, the limit, to match with the base model's modules. Simplify "
        f"{quoted(max(patterns, key=len))}"
    )
