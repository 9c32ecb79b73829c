"""The worker's gRPC service: sessions in, tokens out. Runs on an event loop beside the engine's thread.

Owns: the session and stream of each engine request, the columns of a step, heartbeats. Leaves to others: scheduling
(engine/), the server and its address (actor.py).

All state is used on the event loop only. The engine's thread posts its events and continues; a gateway that does not
read loses its session and never blocks the engine.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable

import grpc

from lorafleet.proto import worker_pb2, worker_pb2_grpc
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.thread import EngineThread
from lorafleet.workers.errors import (
    DrainingError,
    InternalError,
    InvalidRequestError,
    LoRAFleetError,
    UnknownModelError,
)
from lorafleet.workers.request_wire import FINISH_TO_WIRE, error_to_wire, from_wire, prompt_logprobs_to_wire
from lorafleet.workers.rpc import failure_of
from lorafleet.workers.scheduling.request import FinishReason, RequestEvent
from lorafleet.workers.server.adapter_registry import AdapterRegistry
from lorafleet.workers.server.adapter_use import AdapterUse
from lorafleet.workers.server.load_report import Places, heartbeat, places_of, report
from lorafleet.workers.server.output_rates import OutputRates
from lorafleet.workers.text.files import chunks

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
HELLO_TIMEOUT_S = 5.0
# Unread steps a session may have: some ten seconds of a fast model.
MAX_UNREAD = 1024


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Serves one engine. Create it on the serving event loop; `start` starts the engine's thread."""

    def __init__(
        self,
        engine: Engine,
        registry: AdapterRegistry,
        *,
        worker_id: str,
        generation: int,
        on_crash: Callable[[], None],
        hung_step_s: float = math.inf,
        on_hung: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_crash` is called on the event loop after the engine thread crashed and all requests were failed,
        `on_hung` when a step is older than `hung_step_s`: requests are not failed then, since other workers may resume
        them."""
        self._engine = engine
        self._registry = registry
        self._worker_id = worker_id
        self._generation = generation
        self._output_rates = OutputRates()
        self._on_crash = on_crash
        self._loop = asyncio.get_running_loop()
        self._thread = EngineThread(engine, self._publish, self._crashed)
        self._sessions: set[_Session] = set()
        self._owners: dict[str, tuple[_Session, int]] = {}  # engine request id → (session, stream)
        self._use = AdapterUse(time.monotonic)
        self._session_count = 0
        self._draining = False
        self._hung_step_s = hung_step_s
        self._on_hung = on_hung
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._thread.start()
        self._watch = asyncio.create_task(self._watch_steps(), name="step watch")

    async def stop(self) -> None:
        """Stop the engine's thread after its current step."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await asyncio.to_thread(self._thread.stop)

    @property
    def num_unfinished(self) -> int:
        return len(self._owners)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    async def Session(
        self, requests: AsyncIterator[worker_pb2.GatewayMessage], context: grpc.aio.ServicerContext
    ) -> None:
        hello = await self._hello(context)
        self._session_count += 1
        session = _Session(f"{self._session_count}", hello.gateway_id)
        self._sessions.add(session)
        logger.info("session %s with gateway %s begins", session.name, session.gateway_id)
        session.put(
            worker_pb2.WorkerMessage(welcome=worker_pb2.Welcome(worker_id=self._worker_id, generation=self._generation))
        )
        tasks = [
            asyncio.create_task(self._receive(session, context)),
            asyncio.create_task(session.send_to(context)),
            asyncio.create_task(session.overflow.wait()),
            asyncio.create_task(self._heartbeats(session)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            self._sessions.discard(session)
            for engine_id in session.streams.values():
                self._owners.pop(engine_id, None)
                self._use.cut(engine_id)
                self._engine.cancel(engine_id)
            why = "its gateway does not read" if session.overflow.is_set() else "closed"
            logger.info("session %s ends (%s), %d requests cancelled", session.name, why, len(session.streams))

    async def GetReport(
        self, request: worker_pb2.ReportRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerReport:
        stats = self._engine.stats()
        rates = self._output_rates.look(stats.output_tokens_of)
        return report(stats, self._state(), self._worker_id, self._generation, rates)

    async def Drain(self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext) -> worker_pb2.DrainReply:
        self.drain()
        return worker_pb2.DrainReply(num_unfinished=self.num_unfinished)

    async def RegisterAdapter(
        self, request: worker_pb2.RegisterAdapterRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RegisterAdapterReply:
        try:
            adapter = await asyncio.wrap_future(self._registry.register(request))
        except LoRAFleetError as error:
            logger.info("adapter %s refused: %s", request.name, error.message)
            return worker_pb2.RegisterAdapterReply(failure=failure_of(error))
        self._registry.prefetch(adapter)
        logger.info("adapter %s version %d is %s", adapter.name, adapter.version, adapter.digest)
        return worker_pb2.RegisterAdapterReply(adapter=adapter)

    async def UnregisterAdapter(
        self, request: worker_pb2.UnregisterAdapterRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.UnregisterAdapterReply:
        try:
            freeing = await asyncio.wrap_future(self._registry.unregister(request.name, request.version))
        except UnknownModelError:
            return worker_pb2.UnregisterAdapterReply(found=False)
        logger.info("adapter %s version %d is unloaded", request.name, request.version)
        if freeing is None:
            return worker_pb2.UnregisterAdapterReply(found=True)
        freed = await asyncio.wrap_future(freeing)
        return worker_pb2.UnregisterAdapterReply(found=True, device_bytes=freed.device, host_bytes=freed.host)

    async def ListAdapters(
        self, request: worker_pb2.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ListAdaptersReply:
        return worker_pb2.ListAdaptersReply(adapters=self._registry.all(), names=self._registry.names())

    async def NoteAdapters(
        self, request: worker_pb2.NoteAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.NoteAdaptersReply:
        self._registry.note(request.adapters)
        return worker_pb2.NoteAdaptersReply()

    async def GetUse(
        self, request: worker_pb2.GetUseRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.GetUseReply:
        return worker_pb2.GetUseReply(digests=self._use.used(request.digests, request.cut_s))

    async def GetFiles(
        self, request: worker_pb2.GetFilesRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.FileChunk]:
        try:
            files = await asyncio.wrap_future(self._registry.text_files(request.digest))
        except LoRAFleetError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
            return
        if files is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"No files with digest {request.digest} are known here.")
            return
        for name, data in chunks(files):
            yield worker_pb2.FileChunk(name=name, data=data)

    async def _hello(self, context: grpc.aio.ServicerContext) -> worker_pb2.Hello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"No Hello within {HELLO_TIMEOUT_S:g} s.")
        if first is grpc.aio.EOF or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The first message of a session must be Hello.")
        hello: worker_pb2.Hello = first.hello
        if (hello.worker_id, hello.generation) != (self._worker_id, self._generation):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"This is worker {self._worker_id}, generation {self._generation}; the routing table that named "
                f"{hello.worker_id}, generation {hello.generation}, is out of date.",
            )
        return hello

    async def _receive(self, session: _Session, context: grpc.aio.ServicerContext) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            kind = message.WhichOneof("message")
            if kind == "generate":
                self._generate(session, message.generate)
            elif kind == "cancel":
                engine_id = session.streams.get(message.cancel.stream)
                if engine_id is not None:
                    self._engine.cancel(engine_id)

    def _generate(self, session: _Session, generate: worker_pb2.Generate) -> None:
        """Accept a request, or end it with its error. No request, and no bug of ours in one, ends the session."""
        stream = generate.stream
        engine_id = f"{session.name}.{stream}"
        try:
            if self._draining:
                raise DrainingError("This worker is shutting down.")
            if stream in session.streams:
                logger.error("session %s names the running stream %d again; ignored", session.name, stream)
                return  # an Ended would end the running request at its gateway
            if stream <= session.last_stream:
                raise InvalidRequestError(f"Stream {stream} was used before; a session's streams only grow.")
            session.last_stream = stream
            request = from_wire(generate, request_id=engine_id)
            self._engine.submit(request, waits_for_files=False)
        except Exception as error:
            session.put(worker_pb2.WorkerMessage(step=worker_pb2.StepOutputs(ended=[_refusal(generate, error)])))
            return
        session.streams[stream] = engine_id
        self._owners[engine_id] = (session, stream)
        self._use.begin(engine_id, request.digests)

    async def _heartbeats(self, session: _Session) -> None:
        told: Places = {}
        while True:
            stats = self._engine.stats()
            places = places_of(stats)
            beat = heartbeat(stats, self._state(), places, told, len(self._sessions))
            session.put(worker_pb2.WorkerMessage(heartbeat=beat))
            told = places
            await asyncio.sleep(HEARTBEAT_S)

    async def _watch_steps(self) -> None:
        age_s = 0.0
        while age_s <= self._hung_step_s:
            await asyncio.sleep(HEARTBEAT_S)
            age_s = self._engine.stats().last_step_age_s
        logger.critical("a step has run for %.1f s, over the limit of %g s: the worker ends", age_s, self._hung_step_s)
        self._on_hung()

    def _state(self) -> worker_pb2.WorkerState:
        return worker_pb2.WORKER_DRAINING if self._draining else worker_pb2.WORKER_READY

    def _publish(self, step: int, events: list[RequestEvent]) -> None:
        """Post a step's events to the event loop. Runs in the engine's thread."""
        self._loop.call_soon_threadsafe(self._deliver_or_end, step, events)

    def _deliver_or_end(self, step: int, events: list[RequestEvent]) -> None:
        """Deliver a step's events. If that fails, fail all requests: clients would wait for lost tokens for ever."""
        try:
            self._deliver(step, events)
        except Exception:
            logger.exception("the outputs of step %d cannot be delivered; the worker ends", step)
            self._fail_all()

    def _deliver(self, step: int, events: list[RequestEvent]) -> None:
        """Send one StepOutputs per session with events."""
        outputs: dict[_Session, worker_pb2.StepOutputs] = {}
        for event in events:
            owner = self._owners.get(event.request_id)
            if owner is None:
                continue  # its session has ended
            session, stream = owner
            output = outputs.get(session)
            if output is None:
                output = outputs[session] = worker_pb2.StepOutputs(step=step)
            if event.prompt_logprobs is not None:
                output.prompt_logprobs.append(prompt_logprobs_to_wire(event.prompt_logprobs, stream=stream))
            if event.num_cached_tokens:
                output.cached.add(stream=stream, num_tokens=event.num_cached_tokens)
            if event.token_id is not None:
                if event.logprobs is not None:
                    output.logprobs.add(
                        row=len(output.stream),
                        logprob=event.logprobs.logprob,
                        rank=event.logprobs.rank,
                        top_ids=event.logprobs.top_ids,
                        top_logprobs=event.logprobs.top_logprobs,
                    )
                output.stream.append(stream)
                output.token_id.append(event.token_id)
                output.finish.append(FINISH_TO_WIRE[event.finish])
            elif event.finish is FinishReason.CANCELLED:
                output.ended.add(stream=stream, cancelled=True)
            elif event.finish is FinishReason.LENGTH:
                output.ended.add(stream=stream, finish=FINISH_TO_WIRE[event.finish])
            elif event.finish is not None:
                output.ended.append(error_to_wire(event.error or InternalError("The request failed."), stream=stream))
            if event.finish is not None:
                del self._owners[event.request_id]
                del session.streams[stream]
                self._use.end(event.request_id)
        for session, output in outputs.items():
            session.put(worker_pb2.WorkerMessage(step=output))

    def _crashed(self, error: BaseException) -> None:
        """Fail all requests, on the event loop. Runs in the engine's thread."""
        self._loop.call_soon_threadsafe(self._fail_all)

    def _fail_all(self) -> None:
        self._draining = True
        failure = InternalError("The engine crashed; the worker's log says why.")
        for session in self._sessions:
            ended = [error_to_wire(failure, stream=stream) for stream in session.streams]
            session.streams.clear()
            session.put(worker_pb2.WorkerMessage(step=worker_pb2.StepOutputs(ended=ended)))
        self._owners.clear()
        # Leave the messages half a second to be sent.
        self._loop.call_later(0.5, self._on_crash)


def _refusal(generate: worker_pb2.Generate, error: Exception) -> worker_pb2.Ended:
    """Log why a request is not accepted, and return its end."""
    if isinstance(error, LoRAFleetError):
        logger.info("request %s refused: %s", generate.request_id, error.message)
    else:
        logger.error("request %s cannot be accepted", generate.request_id, exc_info=error)
        error = InternalError("The worker could not accept the request; its log says why.")
    return error_to_wire(error, stream=generate.stream)


class _Session:
    """One gateway's session: its open streams and its unread messages."""

    def __init__(self, name: str, gateway_id: str) -> None:
        self.name = name
        self.gateway_id = gateway_id
        self.streams: dict[int, str] = {}  # open streams → engine request ids
        self.last_stream = 0
        self.overflow = asyncio.Event()  # MAX_UNREAD messages are unread: the session must end
        self._unread: asyncio.Queue[worker_pb2.WorkerMessage] = asyncio.Queue()

    def put(self, message: worker_pb2.WorkerMessage) -> None:
        """Queue a message; never blocks, never grows without bound."""
        if self._unread.qsize() < MAX_UNREAD:
            self._unread.put_nowait(message)
        else:
            self.overflow.set()

    async def send_to(self, context: grpc.aio.ServicerContext) -> None:
        while True:
            await context.write(await self._unread.get())
