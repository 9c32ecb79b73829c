"""A fleet in the test's own process: a real gateway over real gRPC, with a scripted worker and controller.

A fake worker's tokens are a checkable function of the prompt: it repeats the prompt, unless `answer` says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import aiohttp
import grpc.aio
import openai
import pytest
import tokenizers

from lorafleet.controller.gateway.api.state import GatewayState
from lorafleet.controller.gateway.config import GatewayConfig, SessionTimes
from lorafleet.controller.gateway.limits import Limits
from lorafleet.controller.gateway.listener import Listener
from lorafleet.proto import controller_pb2, controller_pb2_grpc, worker_pb2, worker_pb2_grpc
from lorafleet.workers.text.tokenizer import Tokenizer

TOKEN = "fleet-token"
MAX_MODEL_LEN = 64
SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),  # as every server of the fleet
    ("grpc.http2.max_ping_strikes", 0),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_files() -> dict[str, bytes]:
    """Return a byte-level BPE tokenizer of a few words, with ids for parts of characters."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog. hello world! " * 4], trainer)
    config = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps({"temperature": 0.25, "top_k": 40}).encode(),
    }


@pytest.fixture(scope="session")
def tokenizer(tokenizer_files: dict[str, bytes]) -> Tokenizer:
    return Tokenizer.from_files(tokenizer_files)


@dataclass(eq=False)
class Running:
    """One request on the fake worker."""

    generate: worker_pb2.Generate
    num_output: int = 0  # including those before a resume

    def __post_init__(self) -> None:
        self.num_output = len(self.generate.output_token_ids)


@dataclass(eq=False)
class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """Answers each request with one token per step; `gate` holds the steps back, `permits` counts them."""

    eos: int
    worker_id: str = "worker-a"
    generation: int = 1
    state: worker_pb2.WorkerState = worker_pb2.WORKER_READY
    answer: list[int] | None = None  # None: repeats the prompt
    last: worker_pb2.Finish | None = None  # finish of `answer`'s last token; None: it begins again
    permits: int | None = None  # steps that may still be taken; None: any number
    error: worker_pb2.Ended | None = None  # how each request ends at once
    num_cached: list[int] = field(default_factory=list)  # cached tokens of the next requests, in order
    heartbeats: bool = True
    welcome: bool = True
    device_adapters: list[str] = field(default_factory=list)
    load: worker_pb2.Load = field(
        default_factory=lambda: worker_pb2.Load(num_pages=100, num_free_pages=75, page_size=16)
    )
    generates: list[worker_pb2.Generate] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    hellos: list[worker_pb2.Hello] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)  # bearer tokens seen
    address: str = ""
    num_steps: int = 0
    sessions: list[dict[int, Running]] = field(default_factory=list)  # running requests, by session and stream
    server: Any = None

    async def start(self, port: int = 0) -> None:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.server.start()

    async def kill(self) -> None:
        """Cut every stream at once."""
        if self.server is not None:
            await self.server.stop(None)
            self.server = None

    @property
    def running(self) -> list[Running]:
        """Return the requests that have not ended."""
        return [running for session in self.sessions for running in session.values()]

    @property
    def endpoint(self) -> controller_pb2.WorkerEndpoint:
        return controller_pb2.WorkerEndpoint(
            worker_id=self.worker_id,
            generation=self.generation,
            address=self.address,
            state=worker_pb2.WORKER_READY,
            max_num_seqs=8,
            max_loras=2,
        )

    async def Session(self, requests: Any, context: Any) -> None:
        self.tokens.append(dict(context.invocation_metadata()).get("authorization", ""))
        hello = (await context.read()).hello
        self.hellos.append(hello)
        running: dict[int, Running] = {}
        self.sessions.append(running)
        if not self.welcome:
            await asyncio.Event().wait()
        await context.write(
            worker_pb2.WorkerMessage(welcome=worker_pb2.Welcome(worker_id=self.worker_id, generation=self.generation))
        )
        reader = asyncio.create_task(self._read(context, running))
        try:
            beat_at = 0.0
            told: dict[str, worker_pb2.AdapterTier] = {}
            loop = asyncio.get_running_loop()
            while not reader.done():
                if self.heartbeats and loop.time() >= beat_at:
                    beat_at = loop.time() + 0.05
                    await context.write(worker_pb2.WorkerMessage(heartbeat=self._heartbeat(told)))
                step = self._step(running)
                if step is not None:
                    await context.write(worker_pb2.WorkerMessage(step=step))
                await asyncio.sleep(0 if step is not None else 0.002)
        finally:
            self.sessions.remove(running)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, context: Any, running: dict[int, Running]) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            if message.WhichOneof("message") == "generate":
                self.generates.append(message.generate)
                running[message.generate.stream] = Running(message.generate)
            else:
                self.cancels.append(message.cancel.stream)
                running.pop(message.cancel.stream, None)

    def _heartbeat(self, told: dict[str, worker_pb2.AdapterTier]) -> worker_pb2.Heartbeat:
        tiers = dict.fromkeys(self.device_adapters, worker_pb2.ADAPTER_DEVICE)
        changed = [(digest, tier) for digest, tier in tiers.items() if told.get(digest) != tier]
        changed += [(digest, worker_pb2.ADAPTER_ABSENT) for digest in told if digest not in tiers]
        told.clear()
        told.update(tiers)
        return worker_pb2.Heartbeat(
            state=self.state,
            load=self.load,
            pace=worker_pb2.Pace(step_s=0.03, prompt_token_s=0.0005, seat_s=3.0, host_load_s=0.02, disk_load_s=0.3),
            adapters=[worker_pb2.AdapterPlace(digest=digest, tier=tier) for digest, tier in changed],
        )

    def _step(self, own: dict[int, Running]) -> worker_pb2.StepOutputs | None:
        if not own or self.permits == 0:
            return None
        if self.permits is not None:
            self.permits -= 1
        self.num_steps += 1
        step = worker_pb2.StepOutputs(step=self.num_steps)
        for stream, running in list(own.items()):
            if self.error is not None:
                ended = worker_pb2.Ended()
                ended.CopyFrom(self.error)
                ended.stream = stream
                step.ended.append(ended)
                del own[stream]
                continue
            if self._advance(step, stream, running):
                del own[stream]
        return step

    def _advance(self, step: worker_pb2.StepOutputs, stream: int, running: Running) -> bool:
        generate = running.generate
        sampling = generate.sampling
        source = self.answer if self.answer is not None else list(generate.prompt_token_ids)
        token_id = source[running.num_output % len(source)]
        running.num_output += 1
        if running.num_output == 1 and self.num_cached and (num_tokens := self.num_cached.pop(0)):
            step.cached.add(stream=stream, num_tokens=num_tokens)
        finish = worker_pb2.FINISH_NONE
        if token_id in sampling.stop_token_ids or (token_id == self.eos and not sampling.ignore_eos):
            finish = worker_pb2.FINISH_STOP
        elif self.last is not None and running.num_output == len(source):
            finish = self.last
        elif running.num_output >= sampling.max_tokens:
            finish = worker_pb2.FINISH_LENGTH
        if sampling.HasField("logprobs"):
            top = [token_id, *range(10, 9 + sampling.logprobs)][: sampling.logprobs]
            step.logprobs.append(
                worker_pb2.Logprobs(
                    row=len(step.stream),
                    logprob=-0.5,
                    rank=1,
                    top_ids=top,
                    top_logprobs=[-0.5 - number for number in range(len(top))],
                )
            )
        step.stream.append(stream)
        step.token_id.append(token_id)
        step.finish.append(finish)
        return finish != worker_pb2.FINISH_NONE


@dataclass(eq=False)
class FakeController(controller_pb2_grpc.ControllerServicer):
    """Publishes the whole `table` at every `publish`."""

    files: dict[str, dict[str, bytes]]
    table: controller_pb2.RoutingTable
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    num_watches: int = 0
    watches: list[controller_pb2.WatchRequest] = field(default_factory=list)
    loads: list[controller_pb2.LoadAdapterRequest] = field(default_factory=list)
    update_failure: worker_pb2.Failure | None = None
    status: controller_pb2.FleetStatus = field(default_factory=controller_pb2.FleetStatus)
    address: str = ""
    server: Any = None

    async def start(self, port: int = 0) -> None:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        controller_pb2_grpc.add_ControllerServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.server.start()

    async def kill(self) -> None:
        if self.server is not None:
            await self.server.stop(None)
            self.server = None

    def publish(self) -> None:
        self.table.version += 1
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[controller_pb2.RoutingTable]:
        self.num_watches += 1
        self.watches.append(request)
        while True:
            changed = self.changed
            yield self.table
            await changed.wait()

    async def LoadAdapter(self, request: Any, context: Any) -> controller_pb2.AdapterUpdate:
        self.loads.append(request)
        return await self._update(lambda: self.table.adapters.add(name=request.name, digest="new", version=1))

    async def UnloadAdapter(self, request: Any, context: Any) -> controller_pb2.AdapterUpdate:
        kept = [adapter for adapter in self.table.adapters if adapter.name != request.name]

        def change() -> None:
            self.table.ClearField("adapters")
            self.table.adapters.extend(kept)

        update = await self._update(change)
        update.device_bytes, update.host_bytes, update.num_draining = 1000, 300, 1
        return update

    async def GetStatus(self, request: Any, context: Any) -> controller_pb2.FleetStatus:
        return self.status

    async def _update(self, change: Callable[[], object]) -> controller_pb2.AdapterUpdate:
        """Answer first and publish a moment later, as may happen on two streams."""
        if self.update_failure is not None:
            return controller_pb2.AdapterUpdate(failure=self.update_failure)
        change()
        asyncio.get_running_loop().call_later(0.1, self.publish)
        return controller_pb2.AdapterUpdate(incarnation=self.table.incarnation, version=self.table.version + 1)

    async def GetFiles(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.FileChunk]:
        if request.digest not in self.files:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no files {request.digest}")
        for name, data in self.files[request.digest].items():
            for start in range(0, len(data), 1000):
                yield worker_pb2.FileChunk(name=name, data=data[start : start + 1000])


@dataclass(eq=False)
class Fleet:
    """A gateway, its controller and its workers."""

    controller: FakeController
    workers: list[FakeWorker]
    state: GatewayState
    listener: Listener
    url: str
    http: aiohttp.ClientSession
    openai: openai.AsyncOpenAI

    @property
    def worker(self) -> FakeWorker:
        return self.workers[0]

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """Post a request. Return (status, JSON)."""
        data = {"json": body} if not isinstance(body, bytes) else {"data": io.BytesIO(body)}
        options.setdefault("headers", {"Content-Type": "application/json"} if isinstance(body, bytes) else {})
        async with self.http.post(path, **data, **options) as response:
            return response.status, await response.json()

    async def get(self, path: str, **options: Any) -> tuple[int, str]:
        async with self.http.get(path, **options) as response:
            return response.status, await response.text()

    async def until(self, check: Callable[[], object], timeout_s: float = 10.0) -> None:
        await until(check, timeout_s)

    async def ready(self) -> None:
        await until(lambda: self.state.not_ready_reason is None)


async def until(check: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until `check()` is true; fail the test if it is not in time."""
    try:
        async with asyncio.timeout(timeout_s):
            while not check():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.005)
    except TimeoutError:
        pytest.fail("a condition did not come true in time")


@pytest.fixture
def eventually() -> Callable[..., Awaitable[None]]:
    return until


QUICK = SessionTimes(welcome_s=2.0, suspect_s=0.5, dead_s=1.5, first_backoff_s=0.02, last_backoff_s=0.1)

FleetMaker = Callable[..., Awaitable[Fleet]]


@pytest.fixture
def new_worker(tokenizer: Tokenizer) -> Callable[..., FakeWorker]:
    def make(**options: Any) -> FakeWorker:
        eos = tokenizer.token_to_id("<|im_end|>")
        assert eos is not None
        return FakeWorker(eos, **options)

    return make


@pytest.fixture
async def new_fleet(
    tokenizer_files: dict[str, bytes], tokenizer: Tokenizer, new_worker: Callable[..., FakeWorker]
) -> AsyncIterator[FleetMaker]:
    """Makes fleets and takes them down. Keyword arguments go to the gateway's configuration and its limits."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            *, num_workers: int = 1, wait: bool = True, headers: dict[str, str] | None = None, **options: Any
        ) -> Fleet:
            workers = [new_worker(worker_id=f"worker-{'abc'[number]}") for number in range(num_workers)]
            for worker in workers:
                await worker.start()
                stack.push_async_callback(worker.kill)
            controller = FakeController({"tok-1": tokenizer_files}, routing_table(workers, tokenizer.vocab_size))
            await controller.start()
            stack.push_async_callback(controller.kill)
            names = {entry.name for entry in fields(Limits)}
            bounds = Limits(**{name: options.pop(name) for name in list(options) if name in names})
            config = replace(
                GatewayConfig(controller=controller.address, token=TOKEN, seed=7, times=QUICK, worker_wait_s=0.3),
                limits=bounds,
                **options,
            )
            state = GatewayState(config)
            listener = Listener(state)
            await listener.set_up()
            stack.push_async_callback(listener.close)
            url = f"http://127.0.0.1:{await listener.listen('127.0.0.1', 0)}"
            key = config.api_keys[0] if config.api_keys else "none"
            headers = headers or {"Authorization": f"Bearer {key}"}
            http = aiohttp.ClientSession(url, headers=headers, timeout=aiohttp.ClientTimeout(total=60))
            stack.push_async_callback(http.close)
            client = openai.AsyncOpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=60)
            stack.push_async_callback(client.close)
            fleet = Fleet(controller, workers, state, listener, url, http, client)
            if wait:
                await fleet.ready()
            return fleet

        yield make


@pytest.fixture
async def fleet(new_fleet: FleetMaker) -> Fleet:
    return await new_fleet()


def routing_table(workers: list[FakeWorker], vocab_size: int) -> controller_pb2.RoutingTable:
    table = controller_pb2.RoutingTable(
        incarnation="one",
        version=1,
        base=controller_pb2.BaseModel(
            names=["tiny", "tiny-alias"],
            root="/models/tiny",
            created=1_700_000_000,
            tokenizer_digest="tok-1",
            max_model_len=MAX_MODEL_LEN,
            vocab_size=vocab_size,
        ),
        workers=[worker.endpoint for worker in workers],
    )
    for name, digest in (("sql-adapter", "d-sql"), ("org/pirate", "d-pirate")):
        table.adapters.add(
            name=name, digest=digest, version=1, root=f"/adapters/{name}", parent="tiny", created=1_700_000_001
        )
    return table
