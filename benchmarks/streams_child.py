"""A child process with an engine and a few streams that generate while it is asked to.

python -m benchmarks.streams_child MODEL WORKERS_PER_HOST
"""

from __future__ import annotations

import os
import sys
import threading
import time

from benchmarks.child import answer_calls
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest, RequestEvent
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.engine.thread import EngineThread

NUM_OUTPUT_TOKENS = 500  # of a stream; then another one takes its place
START_TIMEOUT_S = 60.0


class Streams:
    """Greedy requests on the base model, and when their tokens came."""

    def __init__(self, model: str, workers_per_host: int) -> None:
        config = EngineConfig(model, kv_cache_memory_bytes=1 << 29, workers_per_host=workers_per_host)
        self._num_threads = config.threads
        self._engine = Engine.from_config(config)
        self._engine.load()
        self._lock = threading.Lock()  # guards the four below
        self._open: set[str] = set()
        self._last_s: dict[str, float] = {}  # the last token of each
        self._gaps_s: list[float] = []
        self._number = 0
        self._all_began = threading.Event()
        EngineThread(self._engine, self._publish, lambda error: os._exit(1)).start()

    def facts(self) -> dict[str, int]:
        return {"num_threads": self._num_threads}

    def begin(self, num_streams: int) -> None:
        """Return when all streams have begun; what comes from then on is counted."""
        self._all_began.clear()
        with self._lock:
            for _ in range(num_streams):
                self._submit()
        if not self._all_began.wait(START_TIMEOUT_S):
            raise TimeoutError(f"the streams have not begun within {START_TIMEOUT_S:.0f} s")
        with self._lock:
            self._gaps_s.clear()
            self._began_s = time.perf_counter()

    def end(self) -> dict[str, float]:
        """Stop the streams; tokens a second since `begin`, and the longest wait of a stream for its next token."""
        with self._lock:
            now = time.perf_counter()
            waits = [now - last for last in self._last_s.values()]
            figures = {
                "tok_per_s": round(len(self._gaps_s) / (now - self._began_s), 1),
                "longest_gap_ms": round(1e3 * max([*self._gaps_s, *waits]), 1),
            }
            cancelled, self._open = self._open, set()
            self._last_s.clear()
        for request_id in cancelled:
            self._engine.cancel(request_id)
        while self._engine.has_unfinished():
            time.sleep(0.001)
        return figures

    def _submit(self) -> None:
        name = str(self._number)
        self._number += 1
        self._open.add(name)
        options = SamplingOptions(max_tokens=NUM_OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
        self._engine.submit(GenerateRequest(name, tuple(range(100, 132)), options))

    def _publish(self, step: int, events: list[RequestEvent]) -> None:
        """In the engine's thread."""
        now = time.perf_counter()
        with self._lock:
            for event in events:
                if event.request_id not in self._open:
                    continue  # cancelled
                last = self._last_s.get(event.request_id)
                if last is not None:
                    self._gaps_s.append(now - last)
                self._last_s[event.request_id] = now
                if event.finish is not None:
                    self._open.remove(event.request_id)
                    del self._last_s[event.request_id]
                    self._submit()
            if self._open and self._open == self._last_s.keys():
                self._all_began.set()


def main() -> None:
    model, workers_per_host = sys.argv[1:]
    streams = Streams(model, int(workers_per_host))
    answer_calls({"facts": streams.facts, "begin": streams.begin, "end": streams.end})


if __name__ == "__main__":
    main()
