"""Which of the base model's modules the regular expressions of a config name, as PEFT matches them, in bounded time.

A regular expression can take for ever and hold Python's lock all the while, so one with repetitions, choices or groups
is matched in a process of its own (pattern_process.py), which the system ends.
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
MAX_CHARS: Final = 1000  # of one
MAX_TOTAL_CHARS: Final = 256 << 10
CPU_S: Final = 3
_WALL_S = 60.0
# Nothing in it can repeat or branch, so that a match takes time in proportion to its length.
_PLAIN = re.compile(r"(?:[\w.^$-]|\\[.dDwWsS])*", re.ASCII)
_PROCESS = Path(__file__).with_name("pattern_process.py")


class PatternError(ValueError):
    """What is wrong with a pattern, as the rest of a sentence."""


def first_matches(patterns: Sequence[str], modules: Sequence[str]) -> dict[str, int]:
    """By module, the number of the first pattern that names it; modules that none names are left out.

    A pattern names modules by their ends: by whole names between dots, or as a regular expression.
    Raises `PatternError`.
    """
    if len(patterns) > MAX_PATTERNS or sum(map(len, patterns)) > MAX_TOTAL_CHARS:
        raise PatternError(
            f"with {len(patterns):,} patterns; at most {MAX_PATTERNS:,} of {MAX_TOTAL_CHARS:,} characters together are "
            "matched"
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
    """The same of whole expressions. patterns: how they are named in an error."""
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
        raise PatternError(f"for {quoted(patterns[answer['number']])}, no regular expression: {answer['error']}")
    first: dict[str, int] = answer["first"]
    return first


def _too_slow(patterns: Sequence[str]) -> PatternError:
    return PatternError(
        f"that takes longer than {CPU_S} s, the limit, to match with the base model's modules. Simplify "
        f"{quoted(max(patterns, key=len))}"
    )
