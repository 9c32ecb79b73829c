"""The other end of peers.Child: answers calls from stdin on stdout, until stdin closes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def answer_calls(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Call `functions` by name. Output of libraries goes to stderr, so that stdout holds only answers."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"result": functions[call["name"]](**call["arguments"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)
