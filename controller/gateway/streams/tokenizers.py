"""Tokenizers and templates of adapters that bring their own, by digest.

Owns: fetching and building each once, keeping the last used. Leaves to others: the base model's
(controller_client.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from typing import Final

import grpc.aio

from lorafleet.controller.gateway.streams.wire import describe
from lorafleet.workers.errors import LoRAFleetError, WorkerUnavailableError
from lorafleet.workers.text.model_text import ModelText

MAX_TEXTS: Final = 32  # in addition to the base model's
MAX_BYTES: Final = 1 << 30  # approximate memory of these
MAX_LOADING: Final = 8  # at once: each has its files in memory
PLACE_S: Final = 60.0  # the longest wait to be one of these
_BYTES_PER_FILE_BYTE = 6  # memory; SmolLM2's tokenizer takes 18 MB for a file of 3.5 MB

logger = logging.getLogger(__name__)


class Tokenizers:
    """The tokenizers in use; to be called on one event loop."""

    def __init__(
        self,
        fetch: Callable[[str], Awaitable[Mapping[str, bytes]]],
        executor: Executor,
        base: Callable[[], ModelText | None] = lambda: None,
    ) -> None:
        """fetch: returns the files of a digest. executor: where tokenizers are built. base: the base model's."""
        self._fetch = fetch
        self._base = base
        self._executor = executor
        self._texts: OrderedDict[str, ModelText] = OrderedDict()  # least recently used first
        self._bytes: dict[str, int] = {}
        self._loading: dict[str, asyncio.Task[ModelText]] = {}
        self._places = asyncio.Semaphore(MAX_LOADING)

    async def get(self, digest: str) -> ModelText:
        """Return the tokenizer and template of a digest. Raises `WorkerUnavailableError` if loading fails."""
        text = self._texts.get(digest)
        if text is not None:
            self._texts.move_to_end(digest)
            return text
        task = self._loading.get(digest)
        if task is None:
            task = self._loading[digest] = asyncio.create_task(self._load(digest), name=f"tokenizer {digest[:16]}")
            task.add_done_callback(lambda _: self._loading.pop(digest, None))
        try:
            return await asyncio.shield(task)  # others wait for it too
        except (grpc.aio.AioRpcError, LoRAFleetError, TimeoutError) as error:
            logger.warning("tokenizer %s cannot be loaded: %s", digest[:16], describe(error))
            raise WorkerUnavailableError("The adapter's tokenizer cannot be loaded now. Try again.") from error

    async def close(self) -> None:
        for task in self._loading.values():
            task.cancel()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)

    async def _load(self, digest: str) -> ModelText:
        async with asyncio.timeout(PLACE_S):
            await self._places.acquire()
        try:
            return await self._fetch_and_build(digest)
        finally:
            self._places.release()

    async def _fetch_and_build(self, digest: str) -> ModelText:
        files = await self._fetch(digest)
        base = self._base()
        known = [*([] if base is None else [base]), *self._texts.values()]
        text = await asyncio.get_running_loop().run_in_executor(
            self._executor, ModelText.from_files, digest, files, known
        )
        self._texts[digest] = text
        self._bytes[digest] = _BYTES_PER_FILE_BYTE * sum(map(len, files.values()))
        while len(self._texts) > 1 and (len(self._texts) > MAX_TEXTS or sum(self._bytes.values()) > MAX_BYTES):
            gone, _ = self._texts.popitem(last=False)
            del self._bytes[gone]
        return text
