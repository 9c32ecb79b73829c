"""The asyncio offline engine: many coroutines generate concurrently over one engine thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.thread import EngineThread
from lorafleet.workers.errors import DrainingError, InternalError, LoRAFleetError, UnknownModelError
from lorafleet.workers.offline.args import EngineArgs
from lorafleet.workers.offline.lora_ids import LoRAIds
from lorafleet.workers.offline.outputs import RequestOutput
from lorafleet.workers.offline.text_requests import Prompt, TextRequests
from lorafleet.workers.params import LoRARequest, SamplingParams
from lorafleet.workers.scheduling.request import RequestEvent
from lorafleet.workers.text.adapter_tokenizers import AdapterTokenizers


class AsyncLLM:
    """Create with `await AsyncLLM.from_engine_args(args)`; usable only on the event loop that created it."""

    def __init__(self, engine: Engine, *, seed: int | None) -> None:
        self.engine = engine
        self._texts = AdapterTokenizers(Path(engine.config.model))
        self.tokenizer = self._texts.model.tokenizer
        self._loop = asyncio.get_running_loop()
        self._lora_ids = LoRAIds(engine, self._texts)
        engine.use_tokenizers(self._lora_ids.tokenizer)
        self._requests = TextRequests(max_model_len=engine.max_model_len, vocab_size_of=engine.vocab_size_of, seed=seed)
        self._queues: dict[str, asyncio.Queue[RequestOutput | LoRAFleetError]] = {}
        self._failure: LoRAFleetError | None = None  # set once the engine has failed or is closed
        self._thread = EngineThread(engine, self._publish, self._crashed)
        self._thread.start()

    @classmethod
    async def from_engine_args(cls, args: EngineArgs) -> AsyncLLM:
        """Load the model off the event loop. Raises `ConfigError`, `ModelError` or `MemoryPlanError`."""

        def load() -> Engine:
            engine = Engine.from_config(args.to_config())
            engine.load()
            return engine

        return cls(await asyncio.to_thread(load), seed=args.seed)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output as it grows; the last one is finished.

        Raises what `LLMEngine.add_request` raises, and the request's own error; `InternalError` after the engine has
        failed, `DrainingError` after `close`. Leaving the iteration early cancels the request.
        """
        self._check_open()
        digest, tokenizer, text_digest = None, self.tokenizer, ""
        if lora_request is not None:
            known = await asyncio.wrap_future(self._lora_ids.find(lora_request))
            digest, tokenizer = known.spec.digest, (known.text or self._texts.model).tokenizer
            text_digest = "" if known.text is None else known.text.digest
            self._check_open()
        if sampling_params.structured_outputs is not None:
            sampling_params = await asyncio.to_thread(self._requests.checked, sampling_params)
            self._check_open()
        generates = self._requests.open(
            request_id,
            prompt,
            sampling_params,
            lora=lora_request,
            digest=digest,
            tokenizer=tokenizer,
            text_digest=text_digest,
        )
        # Unbounded on purpose: all outputs are one shared, growing object, so a slow reader holds small references.
        queue: asyncio.Queue[RequestOutput | LoRAFleetError] = asyncio.Queue()
        self._queues[request_id] = queue
        finished = False
        try:
            for generate in generates:
                self.engine.submit(generate, waits_for_files=False)
            while not finished:
                output = await queue.get()
                if isinstance(output, LoRAFleetError):
                    raise output
                finished = output.finished
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            del self._queues[request_id]
            for generate in () if finished else generates:
                self.engine.cancel(generate.request_id)
            if not finished:
                self._requests.drop(request_id)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Verify an adapter and load it into the host cache before its first request. load_inplace: read it again.

        Other requests continue meanwhile. Raises `AdapterConflictError`, `AdapterRefusedError`,
        `AdapterUnavailableError`, `ModelError`.
        """
        self._check_open()
        await asyncio.wrap_future(self._lora_ids.add(lora_request))
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        """Remove an id; return once its requests have ended and its adapter's slot and memory are free.

        Return False if the id is unknown.
        """
        self._check_open()
        try:
            freed = await asyncio.wrap_future(self._lora_ids.remove(lora_id))
        except UnknownModelError:
            return False
        if freed is not None:
            await asyncio.wrap_future(freed)
        return True

    async def pin_lora(self, lora_id: int) -> bool:
        """Keep an adapter in a device slot until it is removed. Return False if the id is unknown.

        Raises `AdapterConflictError` if only one slot is left unpinned.
        """
        return self._lora_ids.pin(lora_id)

    async def list_loras(self) -> set[int]:
        """Return the ids in use."""
        return self._lora_ids.known()

    async def close(self) -> None:
        """Stop the engine; open requests and all other awaited calls end with an error."""
        await asyncio.to_thread(self._thread.stop)
        self._fail_all(DrainingError("The engine is closed. Create another one."))
        await asyncio.to_thread(self._lora_ids.close)
        await asyncio.to_thread(self.engine.close)
        self._requests.close()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _publish(self, step: int, events: Sequence[RequestEvent]) -> None:
        self._loop.call_soon_threadsafe(self._apply, events)

    def _apply(self, events: Sequence[RequestEvent]) -> None:
        for output in self._requests.apply(events):
            queue = self._queues.get(output.request_id)
            if queue is not None:
                queue.put_nowait(output)
        for engine_id in self._requests.take_cancels():
            self.engine.cancel(engine_id)

    def _crashed(self, error: BaseException) -> None:
        failure = InternalError("The engine thread crashed; the log says why.")
        self._loop.call_soon_threadsafe(self._fail_all, failure)

    def _fail_all(self, error: LoRAFleetError) -> None:
        self._failure = self._failure or error
        for queue in self._queues.values():
            queue.put_nowait(self._failure)
