"""Checks of untrusted grammars in processes of their own, which limits on CPU time and memory end.

Owns: the processes, and the last verdicts. Leaves to others: making a grammar's text (grammar_text.py), compiling it
against a vocabulary (workers/engine/grammars.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from typing import Final

from lorafleet.workers.errors import InvalidRequestError, cut
from lorafleet.workers.scheduling.sampling_options import MAX_GRAMMAR_CHARS

CPU_S: Final = 2  # check_process.py's
_WALL_S: Final = 20.0  # the machine may be busy
_MAX_IDLE: Final = 2  # processes, of some 30 MB
_MAX_REMEMBERED: Final = 1024
_MAX_REMEMBERED_CHARS: Final = 16 << 20
_CODE: Final = "from lorafleet.workers.grammars.check_process import main; main()"


class GrammarChecker:
    """Checks grammars and remembers the verdicts. Thread-safe; each thread that checks has a process meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_closed = False
        self._idle: list[_Process] = []
        self._verdicts: OrderedDict[str, str | InvalidRequestError] = OrderedDict()  # least recently used first
        self._num_chars = 0

    def checked(self, grammar: str, *, param: str = "structured_outputs") -> str:
        """Return a grammar as workers take it. param: the field that errors name. Slow for a new one.

        Raises `InvalidRequestError` for one that does not compile, or exceeds a limit.
        """
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(
                f"{param} makes a grammar of {len(grammar)} characters; the limit is {MAX_GRAMMAR_CHARS}.", param=param
            )
        verdict = self._remembered(grammar)
        if verdict is None:
            verdict = self._check(grammar)
            self._remember(grammar, verdict)
        if isinstance(verdict, InvalidRequestError):
            raise InvalidRequestError(f"{param} {verdict.message}", param=param)
        return verdict

    def knows(self, grammar: str) -> bool:
        """Return whether `checked` is fast."""
        return self._remembered(grammar) is not None

    def close(self) -> None:
        """End the processes: the idle ones now, the others after their checks."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    def _check(self, grammar: str) -> str | InvalidRequestError:
        try:
            task = grammar.encode()
        except UnicodeEncodeError:
            return InvalidRequestError("has a character that is not valid Unicode, an unpaired surrogate.")
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or _Process()
        answer = process.ask(task)
        if answer is None:
            process.end()
            return InvalidRequestError(
                f"is too complex: compiling it takes more than {CPU_S} s of CPU time, too much memory or too deep a "
                "stack. Simplify it."
            )
        with self._lock:
            keeps = len(self._idle) < _MAX_IDLE and not self._is_closed
            if keeps:
                self._idle.append(process)
        if not keeps:
            process.end()
        if "error" in answer:
            return InvalidRequestError(f"cannot be enforced: {cut(' '.join(answer['error'].split()))}")
        return answer["grammar"]

    def _remembered(self, grammar: str) -> str | InvalidRequestError | None:
        with self._lock:
            verdict = self._verdicts.get(grammar)
            if verdict is not None:
                self._verdicts.move_to_end(grammar)
            return verdict

    def _remember(self, grammar: str, verdict: str | InvalidRequestError) -> None:
        with self._lock:
            if grammar not in self._verdicts:
                self._num_chars += len(grammar)
            self._verdicts[grammar] = verdict
            while len(self._verdicts) > _MAX_REMEMBERED or self._num_chars > _MAX_REMEMBERED_CHARS:
                gone, _ = self._verdicts.popitem(last=False)
                self._num_chars -= len(gone)


class _Process:
    """One process. Used by one thread at a time."""

    def __init__(self) -> None:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "RAYON_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=env,
        )

    def ask(self, task: bytes) -> dict[str, str] | None:
        """Return the answer to a task; None if there is none, and will be none to any other."""
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None and sink is not None
        try:
            pending = memoryview(len(task).to_bytes(8) + task)
            while pending:
                pending = pending[sink.write(pending) or 0 :]
        except OSError:
            return None
        poll = select.poll()
        poll.register(source, select.POLLIN)
        answer, until = bytearray(), time.monotonic() + _WALL_S
        while not answer.endswith(b"\n"):
            is_ready = poll.poll(max(0.0, until - time.monotonic()) * 1e3)
            part = source.read(1 << 16) if is_ready else b""
            if not part:
                return None
            answer += part
        return json.loads(answer)  # type: ignore[no-any-return]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
