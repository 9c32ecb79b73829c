"""Program run by check.py: compiles grammars of untrusted callers, one after another, until its input ends.

A grammar may need unbounded time or memory, or so much stack that the process dies: this one, with limits on CPU time
and memory. Each task is a length, eight bytes, and as many of UTF-8; each answer is a line of JSON. Imports llguidance
and the standard library.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from typing import Final

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from lorafleet.workers.grammars.limits import parser_limits

CPU_S: Final = 2
MEMORY_BYTES: Final = 1 << 30
STACK_BYTES: Final = 4 << 20  # a quarter of threads.py's, where the grammar is compiled again
MAX_LARK_CHARS: Final = 1 << 20  # of a GBNF grammar's Lark
HEAD_BYTES: Final = 8


def main() -> None:
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


def _serve() -> None:
    source, limits = sys.stdin.buffer, parser_limits()
    while head := source.read(HEAD_BYTES):
        text = source.read(int.from_bytes(head)).decode()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used_s = int(usage.ru_utime + usage.ru_stime) + 1
        _limit(resource.RLIMIT_CPU, used_s + CPU_S)
        print(json.dumps(_check(text, limits)), flush=True)


def _limit(kind: int, value: int) -> None:
    """Set a limit that may be raised again, unless this process was started with a lower one."""
    _, highest = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if highest == resource.RLIM_INFINITY else min(value, highest), highest))


def _check(text: str, limits: llguidance.LLParserLimits) -> dict[str, str]:
    """Return the grammar in Lark, or the problem with it."""
    try:
        lark = text if text.lstrip().startswith("{") else any_to_lark(text)
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as error:  # the library raises bare Exceptions
        return {"error": f"it is neither Lark nor GBNF: {error}"}
    if len(lark) > MAX_LARK_CHARS:
        return {"error": f"as Lark it has {len(lark)} characters; the limit is {MAX_LARK_CHARS}"}
    is_bad, messages = llguidance.LLMatcher.validate_grammar_with_warnings(lark, limits=limits)
    return {"error": messages[0]} if is_bad else {"grammar": lark}


if __name__ == "__main__":
    main()
