"""The worker's gRPC face over real gRPC, with an engine whose tokens are a checkable function of the request."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import grpc.aio
import pytest

from lorafleet.proto import worker_pb2, worker_pb2_grpc
from lorafleet.workers import service as service_module
from lorafleet.workers.adapter_registry import AdapterRegistry
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.registered import FreedBytes
from lorafleet.workers.engine.request import FinishReason, GenerateRequest, RequestEvent, TokenLogprobs
from lorafleet.workers.engine.stats import EngineStats
from lorafleet.workers.errors import AdapterRefusedError, InvalidRequestError, QueueFullError, UnknownModelError
from lorafleet.workers.rpc import CLIENT_OPTIONS, bearer, create_server
from lorafleet.workers.service import WorkerService

TOKEN = "fleet-token"
WORKER_ID, GENERATION = "worker-a", 7
TIMEOUT_S = 10.0


def expected_tokens(prompt: list[int], max_tokens: int) -> list[int]:
    return [(sum(prompt) + position) % 1000 for position in range(max_tokens)]


class FakeRegistry:
    """Adapters without files; what is freed is freed when the test says so."""

    def __init__(self) -> None:
        self.adapters: dict[str, worker_pb2.Adapter] = {}
        self.prefetched: list[str] = []
        self.freed: Future[FreedBytes] | None = Future()

    def all(self) -> list[worker_pb2.Adapter]:
        return list(self.adapters.values())

    def register(self, request: worker_pb2.RegisterAdapterRequest) -> worker_pb2.Adapter:
        if request.root == "bad":
            raise AdapterRefusedError("bad is bad.", reason="rank_too_large")
        adapter = worker_pb2.Adapter(name=request.name, version=request.version, digest="d", root=request.root)
        self.adapters[request.name] = adapter
        return adapter

    def prefetch(self, adapter: worker_pb2.Adapter) -> None:
        self.prefetched.append(adapter.name)

    def unregister(self, name: str, version: int) -> Future[FreedBytes] | None:
        if name not in self.adapters:
            raise UnknownModelError("No such adapter.")
        del self.adapters[name]
        return self.freed


class FakeEngine:
    """The face that the service and `EngineThread` use. `paused` holds requests back; `crash` fails the next step."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(threads=1)
        self.paused = False
        self.crash = False
        self.step_s = 0.001  # a step takes its time, else no event loop could keep up
        self.num_slots: int | None = None  # of the queue; None: any number
        self.num_cached_tokens = 0  # that each request finds
        self.last_salt = ""
        self._changed = threading.Condition()
        self._running: dict[str, tuple[GenerateRequest, int]] = {}
        self._cancels: list[str] = []
        self._woken = False

    def submit(self, request: GenerateRequest) -> None:
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
            device_adapters=("digest-a",),
            host_adapters=("digest-a", "digest-b"),
            num_steps=3,
            num_output_tokens=5,
            num_prefix_query_tokens=70,
            num_prefix_hit_tokens=32,
            last_step_age_s=0.25,
        )

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
                token_id = (sum(request.prompt_token_ids) + position) % 1000
                finish = FinishReason.LENGTH if position + 1 == request.sampling.max_tokens else None
                logprobs = None
                if request.sampling.num_logprobs is not None:
                    num_top = request.sampling.num_logprobs
                    logprobs = TokenLogprobs(-0.5, 1, (token_id,) * num_top, (-0.5,) * num_top)
                num_cached = self.num_cached_tokens if position == 0 else 0
                events.append(RequestEvent(request_id, token_id, logprobs, finish, num_cached_tokens=num_cached))
                if finish is None:
                    self._running[request_id] = (request, position + 1)
                else:
                    del self._running[request_id]
            return events


@dataclass
class Ending:
    """How a stream ended."""

    finish: int = worker_pb2.FINISH_NONE
    ended: worker_pb2.Ended | None = None


@dataclass
class Client:
    """A gateway's end of one session, gathering what comes."""

    call: Any
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    endings: dict[int, list[Ending]] = field(default_factory=lambda: defaultdict(list))
    logprobs: list[worker_pb2.Logprobs] = field(default_factory=list)
    heartbeats: list[worker_pb2.Heartbeat] = field(default_factory=list)
    cached: list[tuple[int, int]] = field(default_factory=list)

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
        """One message, noted."""
        async with asyncio.timeout(TIMEOUT_S):
            message = await self.call.read()
        assert message is not grpc.aio.EOF, "the session ended"
        if message.WhichOneof("message") == "heartbeat":
            self.heartbeats.append(message.heartbeat)
        step = message.step
        self.cached.extend((cached.stream, cached.num_tokens) for cached in step.cached)
        self.logprobs.extend(step.logprobs)
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


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
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
    yield Worker(engine, registry, service, f"127.0.0.1:{port}", crashed)
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


async def test_requests_of_one_session_run_together_and_each_gets_its_own_tokens(worker: Worker) -> None:
    async with worker.session() as client:
        for stream in range(1, 6):
            await client.generate(stream, [stream, 10], max_tokens=stream)
        for stream in range(1, 6):
            assert (await client.ending(stream)).finish == worker_pb2.FINISH_LENGTH
            assert client.tokens[stream] == expected_tokens([stream, 10], stream)
    assert worker.service.num_unfinished == 0


async def test_whose_a_request_is_and_what_it_weighs_reach_the_engine(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as client:
        await client.generate(1, [1], tenant="acme", tenant_weight=2.5, adapter_weight=0.5, priority=-3)
        await client.generate(2, [1])
        await eventually(lambda: worker.engine.num_running == 2)
        one, other = (request for request, _ in worker.engine._running.values())
        assert (one.tenant, one.tenant_weight, one.adapter_weight, one.priority) == ("acme", 2.5, 0.5, -3)
        assert (other.tenant, other.tenant_weight, other.adapter_weight, other.priority) == ("", 1.0, 1.0, 0)
        await client.generate(3, [1], tenant_weight=1e9)
        ended = (await client.ending(3)).ended
        assert ended is not None and ended.error_code == "invalid_request"
        assert "tenant_weight" in ended.error_message
        worker.engine.resume()
        await client.ending(1)
        await client.ending(2)


async def test_a_composition_reaches_the_engine_and_one_that_cannot_be_is_refused(worker: Worker) -> None:
    worker.engine.paused = True
    parts = [worker_pb2.ComposedAdapter(digest="b", weight=0.7), worker_pb2.ComposedAdapter(digest="a", weight=-2)]
    async with worker.session() as client:
        await client.generate(1, [1], composition=parts)
        await eventually(lambda: worker.engine.num_running == 1)
        ((request, _),) = worker.engine._running.values()
        assert (request.adapter, request.composition) == (None, (("a", -2.0), ("b", 0.7)))
        await client.generate(2, [1], composition=parts, adapter_digest="a")
        await client.generate(3, [1], composition=[worker_pb2.ComposedAdapter(digest="a", weight=float("nan"))])
        for stream, said in ((2, "named once"), (3, "nan")):
            ended = (await client.ending(stream)).ended
            assert ended is not None and ended.error_code == "invalid_request"
            assert said in ended.error_message
        worker.engine.resume()
        await client.ending(1)


async def test_how_much_of_a_prompt_was_found_comes_with_its_first_token(worker: Worker) -> None:
    async with worker.session() as client:
        await client.generate(1, [1], max_tokens=2)
        await client.ending(1)
        assert not client.cached
        worker.engine.num_cached_tokens = 48
        await client.generate(2, [1], max_tokens=3, cache_salt="s")
        await client.ending(2)
        assert client.cached == [(2, 48)]
        assert worker.engine.last_salt == "s"


async def test_sessions_do_not_see_each_others_streams(worker: Worker) -> None:
    async with worker.session() as one, worker.session() as other:
        await one.generate(1, [100])
        await other.generate(1, [200])
        await one.ending(1)
        await other.ending(1)
        assert one.tokens[1] == expected_tokens([100], 4)
        assert other.tokens[1] == expected_tokens([200], 4)


async def test_a_step_is_one_message_with_a_row_for_each_request(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as client:
        for stream in (1, 2, 3):
            await client.generate(stream, [stream], max_tokens=1)
        await eventually(lambda: worker.engine.num_running == 3)
        worker.engine.resume()
        while (message := await client.read()).WhichOneof("message") != "step":
            pass
        assert sorted(message.step.stream) == [1, 2, 3]
        assert message.step.step == 1


async def test_logprobs_name_their_row(worker: Worker) -> None:
    async with worker.session() as client:
        await client.generate(1, [5], max_tokens=1, sampling={"num_logprobs": 2})
        await client.ending(1)
        (logprobs,) = client.logprobs
        assert (logprobs.row, logprobs.rank, list(logprobs.top_ids)) == (0, 1, [5, 5])
        assert list(logprobs.top_logprobs) == [-0.5, -0.5]


async def test_a_cancelled_request_ends_as_cancelled_and_only_once(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as client:
        await client.generate(1, [1])
        await client.generate(2, [2])
        for _ in range(3):
            await client.send(cancel=worker_pb2.Cancel(stream=1))
        await client.send(cancel=worker_pb2.Cancel(stream=99))
        ended = (await client.ending(1)).ended
        assert ended is not None and ended.cancelled and not ended.error_code
        worker.engine.resume()
        await client.ending(2)
        await client.send(cancel=worker_pb2.Cancel(stream=2))
        await client.generate(3, [3])
        await client.ending(3)
        assert {stream: len(endings) for stream, endings in client.endings.items()} == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        pytest.param({"prompt": []}, "invalid_request", id="empty prompt"),
        pytest.param({"prompt": [1], "max_tokens": 0}, "invalid_request", id="max_tokens"),
        pytest.param({"prompt": [1], "sampling": {"temperature": -1.0}}, "invalid_request", id="temperature"),
        pytest.param({"prompt": [1], "sampling": {"min_p": float("nan")}}, "invalid_request", id="not a number"),
        pytest.param({"prompt": [1], "sampling": {"num_logprobs": 4096}}, "invalid_request", id="logprobs"),
        pytest.param({"prompt": [1], "adapter_digest": "unknown"}, "model_not_found", id="adapter"),
    ],
)
async def test_a_bad_request_ends_with_its_error_and_the_session_goes_on(
    worker: Worker, fields: dict[str, Any], code: str
) -> None:
    async with worker.session() as client:
        await client.generate(1, **fields)
        ended = (await client.ending(1)).ended
        assert ended is not None and ended.error_code == code and ended.error_message
        await client.generate(2, [7])
        await client.ending(2)
        assert client.tokens[2] == expected_tokens([7], 4)


async def test_a_request_without_sampling_is_refused(worker: Worker) -> None:
    async with worker.session() as client:
        await client.send(generate=worker_pb2.Generate(stream=1, prompt_token_ids=[1]))
        ended = (await client.ending(1)).ended
        assert ended is not None and ended.error_code == "invalid_request"


async def test_a_stream_number_is_not_used_twice(worker: Worker) -> None:
    async with worker.session() as client:
        await client.generate(1, [1])
        await client.ending(1)
        await client.generate(1, [2])
        await client.read_until(lambda: len(client.endings[1]) == 2)
        ended = client.endings[1][1].ended
        assert ended is not None and ended.error_code == "invalid_request"


async def test_a_full_queue_is_said_so(worker: Worker) -> None:
    worker.engine.paused = True
    worker.engine.num_slots = 1
    async with worker.session() as client:
        await client.generate(1, [1])
        await client.generate(2, [2])
        ended = (await client.ending(2)).ended
        assert ended is not None and ended.error_code == "queue_full"


@pytest.mark.parametrize("wrong", [{"worker_id": "worker-b"}, {"generation": 6}])
async def test_a_hello_for_another_worker_is_refused(worker: Worker, wrong: dict[str, Any]) -> None:
    async def greet() -> None:
        async with worker.session(**wrong):
            pytest.fail("welcomed")

    assert await status(greet()) is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_session_that_does_not_begin_with_hello_is_refused(worker: Worker) -> None:
    async with worker.channel() as stub:
        call = stub.Session(metadata=bearer(TOKEN))
        await call.write(worker_pb2.GatewayMessage(cancel=worker_pb2.Cancel(stream=1)))
        assert await status(call.read()) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_session_without_hello_times_out(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "HELLO_TIMEOUT_S", 0.05)
    async with worker.channel() as stub:
        assert await status(stub.Session(metadata=bearer(TOKEN)).read()) is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("metadata", [None, bearer("wrong"), (("authorization", TOKEN),)])
async def test_every_call_needs_the_fleets_token(worker: Worker, metadata: Any) -> None:
    async with worker.channel() as stub:
        calls = [
            stub.GetReport(worker_pb2.ReportRequest(), metadata=metadata),
            stub.Drain(worker_pb2.DrainRequest(), metadata=metadata),
            stub.Session(metadata=metadata).read(),
        ]
        for call in calls:
            assert await status(call) is grpc.StatusCode.UNAUTHENTICATED


async def test_heartbeats_say_how_the_worker_is(worker: Worker) -> None:
    async with worker.session() as client:
        await client.read_until(lambda: len(client.heartbeats) == 2)
        heartbeat = client.heartbeats[-1]
        assert heartbeat.state == worker_pb2.WORKER_READY
        assert heartbeat.last_step_age_ms == 250
        assert (heartbeat.load.num_pages, heartbeat.load.num_free_pages) == (10, 4)
        assert list(heartbeat.device_adapters) == ["digest-a"]


async def test_a_report_has_identity_load_and_counters(worker: Worker) -> None:
    async with worker.channel() as stub:
        report = await stub.GetReport(worker_pb2.ReportRequest(), metadata=bearer(TOKEN), timeout=TIMEOUT_S)
    assert (report.worker_id, report.generation, report.state) == (WORKER_ID, GENERATION, worker_pb2.WORKER_READY)
    assert list(report.host_adapters) == ["digest-a", "digest-b"]
    assert (report.counters.num_steps, report.counters.num_output_tokens) == (3, 5)
    assert (report.counters.num_prefix_query_tokens, report.counters.num_prefix_hit_tokens) == (70, 32)


async def test_a_draining_worker_finishes_what_runs_and_refuses_the_rest(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as client, worker.channel() as stub:
        await client.generate(1, [1])
        await eventually(lambda: worker.engine.num_running == 1)
        reply = await stub.Drain(worker_pb2.DrainRequest(), metadata=bearer(TOKEN), timeout=TIMEOUT_S)
        assert reply.num_unfinished == 1
        await client.generate(2, [2])
        ended = (await client.ending(2)).ended
        assert ended is not None and ended.error_code == "draining"
        worker.engine.resume()
        assert (await client.ending(1)).finish == worker_pb2.FINISH_LENGTH
        await client.read_until(lambda: bool(client.heartbeats) and client.heartbeats[-1].state == 2)
        reply = await stub.Drain(worker_pb2.DrainRequest(), metadata=bearer(TOKEN), timeout=TIMEOUT_S)
        assert reply.num_unfinished == 0


async def test_the_end_of_a_session_cancels_its_requests_and_no_others(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as stays:
        await stays.generate(1, [1])
        async with worker.session() as leaves:
            for stream in (1, 2, 3):
                await leaves.generate(stream, [stream])
            await eventually(lambda: worker.engine.num_running == 4)
        await eventually(lambda: worker.engine.num_running == 1)
        assert worker.service.num_unfinished == 1
        worker.engine.resume()
        await stays.ending(1)


async def test_a_gateway_that_does_not_read_loses_its_session_and_holds_up_nobody(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MAX_UNREAD", 64)
    worker.engine.paused = True
    async with worker.session() as reads, worker.session() as sleeps:
        # Twenty log-probabilities a row fill gRPC's own buffers soon.
        for stream in range(1, 33):
            await sleeps.generate(stream, [1], max_tokens=2**20, sampling={"num_logprobs": 20})
        await eventually(lambda: worker.engine.num_running == 32)
        worker.engine.resume()
        await eventually(lambda: worker.engine.num_running == 0)
        await reads.generate(1, [1])
        assert (await reads.ending(1)).finish == worker_pb2.FINISH_LENGTH
        assert worker.service.num_unfinished == 0


async def test_when_the_engine_crashes_every_request_is_told_before_the_process_ends(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as one, worker.session() as other:
        await one.generate(1, [1])
        await other.generate(1, [1])
        await other.generate(2, [1])
        await eventually(lambda: worker.engine.num_running == 3)
        worker.engine.crash = True
        worker.engine.wake()
        for client, stream in ((one, 1), (other, 1), (other, 2)):
            ended = (await client.ending(stream)).ended
            assert ended is not None and ended.error_code == "internal_error"
        async with asyncio.timeout(TIMEOUT_S):
            await worker.crashed.wait()


@pytest.mark.parametrize("seed", range(5))
async def test_every_request_ends_exactly_once_whatever_is_done(worker: Worker, seed: int) -> None:
    """Random submissions, cancels, pauses and bad requests on two sessions."""
    draw = random.Random(seed)
    worker.engine.num_slots = 12
    async with worker.session() as one, worker.session() as other:
        sent: dict[int, list[int]] = {0: [], 1: []}
        clients = (one, other)
        for _ in range(200):
            which = draw.randrange(2)
            client, streams = clients[which], sent[which]
            action = draw.random()
            if action < 0.6:
                streams.append(len(streams) + 1)
                prompt = [] if draw.random() < 0.1 else [draw.randrange(1000)]
                await client.generate(streams[-1], prompt, max_tokens=draw.randrange(0, 30))
            elif action < 0.9 and streams:
                await client.send(cancel=worker_pb2.Cancel(stream=draw.choice(streams)))
            elif action < 0.95:
                worker.engine.paused = True
            else:
                worker.engine.resume()
        worker.engine.resume()
        for client, streams in zip(clients, sent.values(), strict=True):
            for stream in streams:
                await client.ending(stream)
            await client.read_until(lambda client=client: len(client.heartbeats) > 1)  # type: ignore[misc]
            assert {len(client.endings[stream]) for stream in streams} == {1}
        assert worker.service.num_unfinished == worker.engine.num_running == 0


async def test_adapters_are_registered_listed_and_unregistered(worker: Worker) -> None:
    call = {"metadata": bearer(TOKEN), "timeout": TIMEOUT_S}
    async with worker.channel() as stub:
        reply = await stub.RegisterAdapter(
            worker_pb2.RegisterAdapterRequest(name="sql", version=3, root="/adapters/sql"), **call
        )
        assert (reply.adapter.name, reply.adapter.version, reply.adapter.digest) == ("sql", 3, "d")
        assert worker.registry.prefetched == ["sql"]
        refused = await stub.RegisterAdapter(worker_pb2.RegisterAdapterRequest(name="x", root="bad"), **call)
        assert (refused.failure.code, refused.failure.reason) == ("adapter_refused", "rank_too_large")
        assert refused.failure.message == "bad is bad."
        listed = await stub.ListAdapters(worker_pb2.ListAdaptersRequest(), **call)
        assert list(listed.adapters) == [reply.adapter]
        assert worker.registry.freed is not None
        worker.registry.freed.set_result(FreedBytes(20, 6))
        gone = await stub.UnregisterAdapter(worker_pb2.UnregisterAdapterRequest(name="sql", version=3), **call)
        assert (gone.found, gone.device_bytes, gone.host_bytes) == (True, 20, 6)
        unknown = await stub.UnregisterAdapter(worker_pb2.UnregisterAdapterRequest(name="sql", version=3), **call)
        assert not unknown.found


async def test_an_unregistration_waits_until_all_is_free_and_goes_on_when_nobody_waits(worker: Worker) -> None:
    freed = worker.registry.freed
    assert freed is not None
    freed.set_running_or_notify_cancel()
    async with worker.channel() as stub:
        request = worker_pb2.RegisterAdapterRequest(name="sql", version=1, root="/adapters/sql")
        await stub.RegisterAdapter(request, metadata=bearer(TOKEN), timeout=TIMEOUT_S)
        forget = worker_pb2.UnregisterAdapterRequest(name="sql", version=1)
        assert await status(stub.UnregisterAdapter(forget, metadata=bearer(TOKEN), timeout=0.2)) is (
            grpc.StatusCode.DEADLINE_EXCEEDED
        )
    assert not freed.cancelled()
    freed.set_result(FreedBytes(0, 0))
