"""One gateway process from start to end.

Owns: signals, the order of shutting down. Leaves to others: flags (__main__.py), listening (listener.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from lorafleet.controller.gateway.api.access_log import AccessLog
from lorafleet.controller.gateway.api.state import GatewayState
from lorafleet.controller.gateway.config import GatewayConfig
from lorafleet.controller.gateway.listener import Listener
from lorafleet.controller.heartbeat import BEAT_S, beat

_READY_POLL_S = 0.05

logger = logging.getLogger(__name__)


async def serve(config: GatewayConfig, *, exit_with_parent: bool) -> None:
    """Listen until a signal (or the parent's death), then drain. A second signal ends the drain.

    Raises OSError if the port is not available.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    state = GatewayState(config)
    access_log = AccessLog(sys.stderr.fileno()) if config.access_log else None
    listener = Listener(state, access_log)
    beating = loop.create_task(_beat()) if exit_with_parent else None
    await listener.set_up()
    try:
        if exit_with_parent:
            _watch_parent(loop, lambda: None if state.intake.draining else stop.set())  # never ends a drain
        if config.reuse_port and not await _can_serve(state, stop):
            return
        port = await listener.listen(config.host, config.port, reuse_port=config.reuse_port)
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"lorafleet gateway listening on http://{host}:{port}", flush=True)
        await stop.wait()
        stop.clear()
        await _first(state.drain(), stop.wait())
    finally:
        await listener.close()
        if access_log is not None:
            access_log.close()
        if beating is not None:
            beating.cancel()
    logger.info("stopped")


async def _beat() -> None:
    """Tell the parent, through stdout, that this event loop is running."""
    while True:
        beat(sys.stdout.fileno())
        await asyncio.sleep(BEAT_S)


async def _can_serve(state: GatewayState, stop: asyncio.Event) -> bool:
    """Wait until requests can be answered; return False if `stop` comes first.

    The kernel balances over all listeners on the port, so do not listen before this process can answer.
    """
    while state.not_ready_reason is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READY_POLL_S):
                await stop.wait()
                return False
    return True


async def _first(*parts: Coroutine[Any, Any, object]) -> None:
    """Run until one of the parts is done."""
    tasks = [asyncio.create_task(part) for part in parts]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _watch_parent(loop: asyncio.AbstractEventLoop, on_death: Callable[[], None]) -> None:
    """Call `on_death` when the parent is gone: it holds the other end of our stdin, which then ends."""

    def watch() -> None:
        try:
            while os.read(sys.stdin.fileno(), 4096):
                pass
        except OSError:
            logger.exception("stdin cannot be read")
        if not loop.is_closed():
            loop.call_soon_threadsafe(on_death)

    # A thread can read any kind of stdin; a daemon, because the read may never return.
    threading.Thread(target=watch, name="parent watch", daemon=True).start()
