"""A worker served over real gRPC, with an engine whose tokens are a checkable function of the request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import grpc.aio
import pytest

from lorafleet.proto import worker_pb2, worker_pb2_grpc
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.registered import FreedBytes
from lorafleet.workers.errors import AdapterRefusedError, InvalidRequestError, QueueFullError, UnknownModelError
from lorafleet.workers.rpc import CLIENT_OPTIONS, bearer, create_server
from lorafleet.workers.scheduling.logprobs import PromptLogprobs, TokenLogprobs
from lorafleet.workers.scheduling.pace import Pace
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest, RequestEvent
from lorafleet.workers.scheduling.stats import EngineStats
from lorafleet.workers.server.adapter_registry import AdapterRegistry
from lorafleet.workers.server.service import WorkerService

TOKEN = "fleet-token"
WORKER_ID, GENERATION = "worker-a", 7
TIMEOUT_S = 10.0


def expected_tokens(prompt: list[int], max_tokens: int) -> list[int]:
    return [(sum(prompt) + position) % 1000 for position in range(max_tokens)]


class FakeRegistry:
    """Adapters without files; memory is freed when the test says so."""

    def __init__(self) -> None:
        self.adapters: dict[str, worker_pb2.Adapter] = {}
        self.prefetched: list[str] = []
        self.freed: Future[FreedBytes] | None = Future()
        self.noted: list[worker_pb2.Adapter] = []

    def note(self, adapters: Iterable[worker_pb2.Adapter]) -> None:
        self.noted.extend(adapters)

    def names(self) -> list[worker_pb2.Adapter]:
        return self.noted

    def all(self) -> list[worker_pb2.Adapter]:
        return list(self.adapters.values())

    def register(self, request: worker_pb2.RegisterAdapterRequest) -> Future[worker_pb2.Adapter]:
        future: Future[worker_pb2.Adapter] = Future()
        if request.root == "hangs":
            return future
        if request.root == "bad":
            future.set_exception(AdapterRefusedError("bad is bad.", reason="rank_too_large"))
            return future
        adapter = worker_pb2.Adapter(name=request.name, version=request.version, digest="d", root=request.root)
        self.adapters[request.name] = adapter
        future.set_result(adapter)
        return future

    def prefetch(self, adapter: worker_pb2.Adapter) -> None:
        self.prefetched.append(adapter.name)

    def unregister(self, name: str, version: int) -> Future[Future[FreedBytes] | None]:
        future: Future[Future[FreedBytes] | None] = Future()
        if name in self.adapters:
            del self.adapters[name]
            future.set_result(self.freed)
        else:
            future.set_exception(UnknownModelError("No such adapter."))
        return future


class FakeEngine:
    """The interface the service and `EngineThread` use. `paused` holds requests back; `crash` fails the next step."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(threads=1)
        self.paused = False
        self.crash = False
        self.step_s = 0.001  # so that the event loop can keep up
        self.num_slots: int | None = None  # of the queue; None: any number
        self.num_cached_tokens = 0  # that each request finds
        self.last_salt: str | None = ""
        self.device_adapters: tuple[str, ...] = ("digest-a",)
        self.registered_adapters: tuple[str, ...] = ("digest-a", "digest-b", "digest-c")
        self._changed = threading.Condition()
        self._running: dict[str, tuple[GenerateRequest, int]] = {}
        self._cancels: list[str] = []
        self._woken = False

    def submit(self, request: GenerateRequest, *, waits_for_files: bool = True) -> None:
        assert not waits_for_files, "the event loop has no time for a file system"
        if not request.prompt_token_ids:
            raise InvalidRequestError("The prompt is empty.", param="prompt")
        if request.adapter == "unknown":
            raise UnknownModelError("No such adapter.")
        with self._changed:
            if self.num_slots is not None and len(self._running) >= self.num_slots:
                raise QueueFullError("Full.")
            assert request.request_id not in self._running
            self.last_salt = request.cache_salt
            self._running[request.request_id] = (request, 0)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self._cancels.append(request_id)
            self._changed.notify_all()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def resume(self) -> None:
        with self._changed:
            self.paused = False
            self._changed.notify_all()

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self.num_running,
            num_pages=10,
            num_free_pages=4,
            device_adapters=self.device_adapters,
            host_adapters=("digest-a", "digest-b"),
            registered_adapters=self.registered_adapters,
            num_steps=3,
            num_output_tokens=5,
            num_prefix_query_tokens=70,
            num_prefix_hit_tokens=32,
            last_step_age_s=0.25,
            pace=Pace(step_s=0.03),
        )

    def take_cores(self) -> None:
        """Do nothing, since it computes nothing."""

    def fail(self) -> None:
        pass

    def bind_thread(self) -> None:
        pass

    def wait_for_work(self, timeout_s: float | None = None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._woken or self._has_work(), timeout_s)
            self._woken = False
            return self._has_work()

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def _has_work(self) -> bool:
        return bool(self._cancels) or (bool(self._running) and not self.paused) or self.crash

    def step(self) -> list[RequestEvent]:
        if self.crash:
            raise RuntimeError("a bug")
        time.sleep(self.step_s)
        with self._changed:
            events = []
            for request_id in self._cancels:
                if self._running.pop(request_id, None) is not None:
                    events.append(RequestEvent(request_id, finish=FinishReason.CANCELLED))
            self._cancels.clear()
            for request_id, (request, position) in [] if self.paused else list(self._running.items()):
                if request.sampling.prompt_logprobs is not None and position == 0:
                    num_top, length = request.sampling.prompt_logprobs, len(request.prompt_token_ids) - 1
                    columns = ([-0.25] * length, [1] * length, [7] * length * num_top, [-0.125] * length * num_top)
                    part = PromptLogprobs.of(num_top, *columns)
                    events.append(RequestEvent(request_id, prompt_logprobs=part))
                if not request.sampling.max_tokens:
                    events.append(RequestEvent(request_id, finish=FinishReason.LENGTH))
                    del self._running[request_id]
                    continue
                token_id = (sum(request.prompt_token_ids) + position) % 1000
                finish = FinishReason.LENGTH if position + 1 == request.sampling.max_tokens else None
                logprobs = None
                if request.sampling.logprobs is not None:
                    num_top = request.sampling.logprobs
                    logprobs = TokenLogprobs(-0.5, 1, (token_id,) * num_top, (-0.5,) * num_top)
                num_cached = self.num_cached_tokens if position == 0 else 0
                events.append(
                    RequestEvent(request_id, token_id, logprobs=logprobs, finish=finish, num_cached_tokens=num_cached)
                )
                if finish is None:
                    self._running[request_id] = (request, position + 1)
                else:
                    del self._running[request_id]
            return events


@dataclass
class Ending:
    """The end of a stream."""

    finish: int = worker_pb2.FINISH_NONE
    ended: worker_pb2.Ended | None = None


@dataclass
class Client:
    """A gateway's end of one session; it collects messages."""

    call: Any
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    endings: dict[int, list[Ending]] = field(default_factory=lambda: defaultdict(list))
    logprobs: list[worker_pb2.Logprobs] = field(default_factory=list)
    heartbeats: list[worker_pb2.Heartbeat] = field(default_factory=list)
    cached: list[tuple[int, int]] = field(default_factory=list)
    prompt_logprobs: list[worker_pb2.PromptLogprobs] = field(default_factory=list)

    async def send(self, **message: Any) -> None:
        await self.call.write(worker_pb2.GatewayMessage(**message))

    async def generate(self, stream: int, prompt: list[int], max_tokens: int = 4, **fields: Any) -> None:
        sampling = worker_pb2.Sampling(
            max_tokens=max_tokens, top_p=1.0, repetition_penalty=1.0, **fields.pop("sampling", {})
        )
        await self.send(
            generate=worker_pb2.Generate(stream=stream, prompt_token_ids=prompt, sampling=sampling, **fields)
        )

    async def read(self) -> worker_pb2.WorkerMessage:
        """Read and keep one message."""
        async with asyncio.timeout(TIMEOUT_S):
            message: worker_pb2.WorkerMessage = await self.call.read()
        assert message is not grpc.aio.EOF, "the session ended"
        if message.WhichOneof("message") == "heartbeat":
            self.heartbeats.append(message.heartbeat)
        step = message.step
        self.cached.extend((cached.stream, cached.num_tokens) for cached in step.cached)
        self.logprobs.extend(step.logprobs)
        self.prompt_logprobs.extend(step.prompt_logprobs)
        for stream, token_id, finish in zip(step.stream, step.token_id, step.finish, strict=True):
            assert not self.endings[stream], "a token after the terminal event"
            self.tokens[stream].append(token_id)
            if finish:
                self.endings[stream].append(Ending(finish=finish))
        for ended in step.ended:
            self.endings[ended.stream].append(Ending(ended=ended))
        return message

    async def read_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.read()

    async def ending(self, stream: int) -> Ending:
        await self.read_until(lambda: bool(self.endings[stream]))
        return self.endings[stream][0]


@dataclass
class Worker:
    """A served fake engine."""

    engine: FakeEngine
    registry: FakeRegistry
    service: WorkerService
    address: str
    crashed: asyncio.Event

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[Any]:
        async with grpc.aio.insecure_channel(self.address, options=CLIENT_OPTIONS) as channel:
            yield cast(Any, worker_pb2_grpc.WorkerStub)(channel)

    @asynccontextmanager
    async def session(
        self, *, worker_id: str = WORKER_ID, generation: int = GENERATION, token: str = TOKEN
    ) -> AsyncIterator[Client]:
        async with self.channel() as stub:
            call = stub.Session(metadata=bearer(token))
            client = Client(call)
            hello = worker_pb2.Hello(worker_id=worker_id, generation=generation, gateway_id="gateway")
            await client.send(hello=hello)
            try:
                welcome = (await client.read()).welcome
                assert (welcome.worker_id, welcome.generation) == (worker_id, generation)
                yield client
            finally:
                call.cancel()


@asynccontextmanager
async def serve_worker() -> AsyncIterator[Worker]:
    engine, crashed = FakeEngine(), asyncio.Event()
    registry = FakeRegistry()
    service = WorkerService(
        cast(Engine, engine),
        cast(AdapterRegistry, registry),
        worker_id=WORKER_ID,
        generation=GENERATION,
        on_crash=crashed.set,
    )
    server = create_server(TOKEN)
    cast(Any, worker_pb2_grpc.add_WorkerServicer_to_server)(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    service.start()
    try:
        yield Worker(engine, registry, service, f"127.0.0.1:{port}", crashed)
    finally:
        await server.stop(None)
        await service.stop()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 (the engine's thread has no event to give)
            await asyncio.sleep(0.005)


async def status(awaitable: Awaitable[object]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        async with asyncio.timeout(TIMEOUT_S):
            await awaitable
    code: grpc.StatusCode = failed.value.code()
    return code
