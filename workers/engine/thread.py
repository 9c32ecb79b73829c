"""A thread that steps an engine, and sleeps while there is nothing to do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.scheduling.request import RequestEvent

logger = logging.getLogger(__name__)


class EngineThread:
    """Steps an engine on its own thread while there is work.

    publish: called on that thread with (step number, events) after each step that has events; it must not block.
    on_crash: called on that thread with the exception of a step; the engine has then failed and is not stepped again.
    """

    def __init__(
        self,
        engine: Engine,
        publish: Callable[[int, list[RequestEvent]], None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._publish = publish
        self._on_crash = on_crash
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lorafleet-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current step, if any. Unfinished requests stay unfinished."""
        self._stopping.set()
        self._engine.wake()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        steps = 0
        try:
            self._engine.take_cores()
            self._engine.bind_thread()
            while not self._stopping.is_set():
                # The timeout only limits a `stop` that races with the wait.
                if not self._engine.wait_for_work(timeout_s=0.5):
                    continue
                events = self._engine.step()
                if events:
                    steps += 1
                    self._publish(steps, events)
        except BaseException as error:
            logger.exception("the engine thread crashed")
            self._engine.fail()
            self._on_crash(error)
