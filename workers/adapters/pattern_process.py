"""Program run by patterns.py: matches regular expressions with names, within limits on CPU time and memory.

Reads a JSON object from standard input and writes one to standard output. Imports only the standard library.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import warnings

_MEMORY_BYTES = 1 << 30


def main() -> None:
    task = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_CPU, (task["cpu_s"], task["cpu_s"] + 1))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    first: dict[str, int] = {}
    for number, expression in enumerate(task["expressions"]):
        try:
            match = re.compile(expression).match
        except (re.error, RecursionError, OverflowError) as error:
            print(json.dumps({"number": number, "error": str(error)[:200]}))
            return
        for module in task["modules"]:
            if module not in first and match(module):
                first[module] = number
    print(json.dumps({"first": first}))


if __name__ == "__main__":
    main()
