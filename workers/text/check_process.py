"""Checks of untrusted tokenizers and templates, in a separate process.

Reading a tokenizer or compiling a template can take seconds while holding Python's lock, and a broken one may kill the
process: no other request may suffer from that. The separate process has limits on CPU time and memory, and tries the
template.

Owns: the process and its limits. Leaves to others: reading the files (model_text.py).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Final

from lorafleet.workers.answers.profile import PROFILE_FILE
from lorafleet.workers.errors import InvalidRequestError, ModelError, cut
from lorafleet.workers.grammars.check import GrammarChecker
from lorafleet.workers.grammars.structured_outputs import default_grammar
from lorafleet.workers.text.model_text import ModelText
from lorafleet.workers.text.template_sandbox import LimitError

CPU_S: Final = 30
_WALL_S = 300.0
_MEMORY_BYTES = 4 << 30
# Long runs of one character, on which a pattern with nested repetitions never ends.
_PROBES = [f"{character * 2000}!{character * 2000}\n" for character in "aZ1 .\n_-é漢"]
_CODE = "from lorafleet.workers.text.check_process import main; main()"


def check_apart(digest: str, files: Mapping[str, bytes]) -> None:
    """Check files in a separate process. Raises ModelError for a broken tokenizer or template, or a passed limit."""
    sizes = json.dumps({"digest": digest, "sizes": {name: len(data) for name, data in files.items()}}).encode()
    task = b"\n".join([sizes, b"".join(files.values())])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CODE], input=task, capture_output=True, timeout=_WALL_S, env=env
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise ModelError(f"The tokenizer cannot be checked: {type(error).__name__}.") from error
    if done.returncode:
        raise ModelError(
            f"The tokenizer or the chat template takes more than {CPU_S} s of CPU time or {_MEMORY_BYTES >> 30} GiB of "
            "memory to read, or breaks the library that reads it."
        )
    message = json.loads(done.stdout)["error"]
    if message is not None:
        raise ModelError(message)


def main() -> None:
    """Run the process: read a task from standard input, write the problem to standard output."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    head, _, data = sys.stdin.buffer.read().partition(b"\n")
    task = json.loads(head)
    files, start = {}, 0
    for name, size in task["sizes"].items():
        files[name] = data[start : start + size]
        start += size
    print(json.dumps({"error": problem(task["digest"], files)}))


def problem(digest: str, files: Mapping[str, bytes]) -> str | None:
    """Return the problem with a tokenizer and its template; None if there is none."""
    try:
        text = ModelText.from_files(digest, files)
        if (default := text.profile.structured_outputs) is not None:
            try:
                GrammarChecker().checked(default_grammar(default))
            except InvalidRequestError as error:
                return f"{PROFILE_FILE}: {error.message}"
        for probe in _PROBES:
            text.tokenizer.encode(probe)
        if text.template.exists:
            text.template.render([{"role": "user", "content": "Hello"}], **text.tokenizer.special_tokens)
    except InvalidRequestError as error:  # a template may refuse this conversation, but not exceed a limit
        if isinstance(error.__cause__, LimitError):
            return f"chat_template: {error.message}"
        return None if isinstance(error.__cause__, Exception) else f"tokenizer.json: {error.message}"
    except ModelError as error:
        return error.message
    except Exception as error:
        return f"The files cannot be read as a tokenizer: {type(error).__name__}: {cut(str(error))}."
    return None
