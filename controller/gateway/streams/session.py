"""The gateway's end of one worker's Session stream: requests and cancels go down, tokens and heartbeats come up.

Owns: connecting, the handshake, liveness, stream numbers. Leaves to others: the choice of worker (routing/router.py,
pool.py), sorting a step's rows (delivery.py), the meaning of tokens (generation.py).

The session has no deadline, since it lives as long as both ends do. Instead, the worker must answer the Hello within
`welcome_s`, and silence of `dead_s` ends the session. However a session ends, each of its choices gets
`WorkerLostError`, and a new session is tried as long as the routing table lists the worker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio

from lorafleet.controller.gateway.config import SessionTimes
from lorafleet.controller.gateway.routing.adapter_tiers import AdapterTiers
from lorafleet.controller.gateway.routing.prefix_memory import PrefixMemory
from lorafleet.controller.gateway.routing.routing_table import Endpoint
from lorafleet.controller.gateway.routing.worker_view import Tier, WorkerView
from lorafleet.controller.gateway.streams.delivery import SessionLost, deliver
from lorafleet.controller.gateway.streams.inbox import ChoiceQueue
from lorafleet.controller.gateway.streams.wire import Backoff, describe, open_channel, worker_stub
from lorafleet.proto import worker_pb2
from lorafleet.workers.errors import WorkerLostError, WorkerUnavailableError
from lorafleet.workers.request_wire import to_wire
from lorafleet.workers.rpc import bearer
from lorafleet.workers.scheduling.pace import Pace
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.server.load_report import pace_from_wire

MAX_UNSENT = 4096  # requests waiting to be sent

logger = logging.getLogger(__name__)


class WorkerSession:
    """The session with one worker, or the attempt to connect to it. Call `start`, then `close`."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        gateway_id: str,
        token: str,
        times: SessionTimes,
        on_open: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """on_open: called when the worker starts to take requests."""
        self.endpoint = endpoint
        self.retired = False  # no longer in the table: takes no new requests
        self._gateway_id = gateway_id
        self._metadata = bearer(token)
        self._times = times
        self._on_open = on_open
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._live = False
        self._streams: dict[int, ChoiceQueue] = {}
        self._last_stream = 0
        self._outbox: deque[worker_pb2.GatewayMessage] = deque()
        self._outbox_filled = asyncio.Event()
        self._outbox_empty = asyncio.Event()
        self._outbox_empty.set()
        self._was_full = False  # a request was refused since
        self._heard_at = 0.0
        self._heartbeat: worker_pb2.Heartbeat | None = None  # None until the first of this session
        self._pace = Pace()
        self._tiers = AdapterTiers()
        self._prefixes = PrefixMemory()
        self._num_unreported = self._num_unreported_tokens = 0

    def start(self) -> None:
        """Connect, and stay connected."""
        self._task = asyncio.create_task(self._run(), name=f"session {self.endpoint.address}")

    async def close(self) -> None:
        """End the session; its requests fail."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    @property
    def num_gateways(self) -> int:
        """Return the number of gateways that use the worker, this one included, as last reported."""
        return 1 if self._heartbeat is None else max(1, self._heartbeat.num_gateways)

    @property
    def num_streams(self) -> int:
        """Return the number of choices that have not ended."""
        return len(self._streams)

    def view(self) -> WorkerView:
        """Return the worker's current state for the router."""
        endpoint, heartbeat = self.endpoint, self._heartbeat
        if heartbeat is None:
            return WorkerView(
                worker_id=endpoint.worker_id,
                ready=False,
                suspect=True,
                max_num_seqs=endpoint.max_num_seqs,
                max_loras=endpoint.max_loras,
                generation=endpoint.generation,
                num_ranks=endpoint.num_ranks,
            )
        load = heartbeat.load
        silent = self._clock() - self._heard_at > self._times.suspect_s
        slow = heartbeat.last_step_age_ms > self._times.slow_step_s * 1000
        ready = self._live and heartbeat.state == worker_pb2.WORKER_READY and not endpoint.draining and not self.retired
        return WorkerView(
            worker_id=endpoint.worker_id,
            ready=ready,
            suspect=silent or slow,
            max_num_seqs=endpoint.max_num_seqs,
            max_loras=endpoint.max_loras,
            generation=endpoint.generation,
            num_ranks=endpoint.num_ranks,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_prompt_tokens=load.num_uncomputed_tokens,
            num_pages=load.num_pages,
            num_free_pages=load.num_free_pages,
            page_size=load.page_size,
            pace=self._pace,
            tiers=self._tiers.tiers,
            num_device_adapters=self._tiers.num_on_device,
            host_usage=load.host_cache_usage,
            expected=self._tiers.expected,
            # Other gateways have sent about as much, which only the worker's next heartbeat will show.
            num_unreported=self._num_unreported * self.num_gateways,
            num_unreported_tokens=self._num_unreported_tokens * self.num_gateways,
        )

    def num_cached_tokens(self, prefix_hashes: Sequence[bytes]) -> int:
        """Return how many of the prompt's tokens the worker has probably cached."""
        return self._prefixes.num_found(prefix_hashes)

    def expect(self, adapters: Sequence[str], num_tokens: int, prefix_hashes: Sequence[bytes]) -> None:
        """Count in a prompt that is about to be submitted. num_tokens: the number of its tokens to compute."""
        self._tiers.expect(adapters)
        self._num_unreported_tokens += num_tokens
        if self._heartbeat is not None:
            load = self._heartbeat.load
            self._prefixes.note(prefix_hashes, load.num_pages * load.page_size)

    def submit(self, queue: ChoiceQueue, request: GenerateRequest) -> int:
        """Send a request whose tokens go to `queue`. Return its stream number, for `cancel`.

        Raises WorkerUnavailableError if there is no session or its queue is full.
        """
        if not self._live or len(self._outbox) >= MAX_UNSENT:
            self._was_full = self._live
            raise WorkerUnavailableError(f"Worker {self.endpoint.worker_id} does not take requests now. Try again.")
        self._last_stream += 1  # 2^32 of them last for weeks at any rate that one worker sustains
        self._streams[self._last_stream] = queue
        self._num_unreported += 1
        self._send(worker_pb2.GatewayMessage(generate=to_wire(request, stream=self._last_stream)))
        return self._last_stream

    async def drained(self) -> None:
        """Wait until everything submitted has been sent or lost."""
        await self._outbox_empty.wait()

    def cancel(self, stream: int) -> None:
        """Stop a request; its queue gets nothing more. Does nothing if it has ended."""
        if self._streams.pop(stream, None) is not None and self._live:
            self._send(worker_pb2.GatewayMessage(cancel=worker_pb2.Cancel(stream=stream)))

    def _send(self, message: worker_pb2.GatewayMessage) -> None:
        self._outbox.append(message)
        self._outbox_filled.set()
        self._outbox_empty.clear()

    async def _run(self) -> None:
        backoff = Backoff(self._times.first_backoff_s, self._times.last_backoff_s)
        logged = ""  # a repeated reason is not logged again
        while True:
            shown = "its connection broke"  # in messages to clients, without addresses
            reason = ""
            try:
                await self._session(backoff)
            except SessionLost as error:
                shown = reason = str(error)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:  # InvalidStateError: the call has ended
                reason = describe(error)
            except Exception as error:  # a bug of ours must not end the session for good
                logger.exception("session with worker %s failed", self.endpoint.worker_id)
                reason = type(error).__name__
            finally:
                was_live = self._live
                self._lose(shown)
            if was_live or reason != logged:
                logger.warning("worker %s at %s: %s", self.endpoint.worker_id, self.endpoint.address, reason)
            logged = reason
            await asyncio.sleep(backoff.next_s())

    def _lose(self, reason: str) -> None:
        """Fail everything on the session."""
        self._live = False
        self._heartbeat = None
        self._tiers.clear()
        self._prefixes.clear()
        self._outbox.clear()
        self._outbox_filled.clear()
        self._outbox_empty.set()
        self._was_full = False
        self._num_unreported = self._num_unreported_tokens = 0
        streams, self._streams = self._streams, {}
        message = (
            f"Worker {self.endpoint.worker_id} was lost before the request ended ({reason}). Send the request again."
        )
        for queue in streams.values():
            queue.lose(WorkerLostError(message))

    async def _session(self, backoff: Backoff) -> None:
        """Run one connection from Hello to its end, which is always an exception."""
        channel = open_channel(self.endpoint.address)
        try:
            call = worker_stub(channel).Session(metadata=self._metadata)
            try:
                async with asyncio.timeout(self._times.welcome_s):
                    await self._greet(call)
            except TimeoutError:
                raise SessionLost(f"no welcome within {self._times.welcome_s:g} s") from None
            backoff.reset()
            self._heard_at = self._clock()
            self._live = True
            logger.info("worker %s: session at %s", self.endpoint.worker_id, self.endpoint.address)
            tasks = [
                asyncio.create_task(part, name=f"session {self.endpoint.address} {name}")
                for name, part in (
                    ("receive", self._receive(call)),
                    ("send", self._send_all(call)),
                    ("watch", self._watch()),
                )
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                call.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await channel.close()

    async def _greet(self, call: Any) -> None:
        endpoint = self.endpoint
        hello = worker_pb2.Hello(
            worker_id=endpoint.worker_id, generation=endpoint.generation, gateway_id=self._gateway_id
        )
        await call.write(worker_pb2.GatewayMessage(hello=hello))
        answer = await call.read()
        if answer is grpc.aio.EOF or answer.WhichOneof("message") != "welcome":
            raise SessionLost("the worker's first message is not a welcome")
        if (answer.welcome.worker_id, answer.welcome.generation) != (endpoint.worker_id, endpoint.generation):
            raise SessionLost(f"another worker answers at {endpoint.address}: {answer.welcome.worker_id!r}")

    async def _send_all(self, call: Any) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:
                await call.write(self._outbox.popleft())
            self._outbox_empty.set()
            if self._was_full:
                self._was_full = False
                self._on_open()

    async def _watch(self) -> None:
        """Raise when the worker has been silent for too long."""
        while True:
            left_s = self._heard_at + self._times.dead_s - self._clock()
            if left_s <= 0:
                raise SessionLost(f"silent for {self._times.dead_s:g} s")
            await asyncio.sleep(left_s)

    async def _receive(self, call: Any) -> None:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                raise SessionLost("the worker ended the session")
            self._heard_at = self._clock()
            kind = message.WhichOneof("message")
            if kind == "step":
                deliver(message.step, self._streams)
            elif kind == "heartbeat":
                before, self._heartbeat = self._heartbeat, message.heartbeat
                beat = self._heartbeat
                if before is None or before.state != beat.state:
                    self._on_open()
                self._tiers.update((place.digest, Tier(place.tier)) for place in beat.adapters)
                self._pace = pace_from_wire(beat.pace)
                self._num_unreported = self._num_unreported_tokens = 0
