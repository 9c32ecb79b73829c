"""One gateway's parts, and what its handlers need of several parts together.

Owns: starting and closing the parts in order, the meaning of "ready", draining. Leaves to others: each part's work.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from aiohttp import web

from lorafleet.controller.gateway.api.ignored_fields import IgnoredFields
from lorafleet.controller.gateway.api.intake import Intake
from lorafleet.controller.gateway.api.served_model import ServedModel
from lorafleet.controller.gateway.config import GatewayConfig
from lorafleet.controller.gateway.metrics.instruments import Metrics
from lorafleet.controller.gateway.metrics.page import MetricsPage, Snapshot
from lorafleet.controller.gateway.metrics.vllm import VllmCollector
from lorafleet.controller.gateway.metrics.workers import FleetCollector
from lorafleet.controller.gateway.routing.routing_table import ModelEntry, RoutingTable
from lorafleet.controller.gateway.streams.controller_client import RoutesClient
from lorafleet.controller.gateway.streams.generation import Generation
from lorafleet.controller.gateway.streams.pool import WorkerPool
from lorafleet.controller.gateway.streams.text_threads import TextThreads
from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.workers.errors import DeadlineError, DrainingError, WorkerUnavailableError
from lorafleet.workers.grammars.check import GrammarChecker
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.text.model_text import ModelText

INLINE_BYTES: Final = 1 << 15  # of JSON; decoding or encoding them takes less than a millisecond
ABORT_GRACE_S: Final = 2.0  # for handlers to report the shutdown to their clients

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class GatewayState:
    """All parts of one gateway. Created on the event loop; call `start`, then `close`."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.intake = Intake(config.limits)
        self.ignored_fields = IgnoredFields()
        self.metrics = Metrics()
        self._round_metrics = Metrics()  # nobody reads these
        gateway_id = uuid.uuid4().hex
        self.grammars = GrammarChecker()
        self._text_threads = TextThreads(config.num_tokenizer_threads)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="tokenizer loader")
        self._pool = WorkerPool(gateway_id=gateway_id, token=config.token, times=config.times)
        self.routes = RoutesClient(
            config.controller,
            token=config.token,
            gateway_id=gateway_id,
            executor=self._loader,
            on_table=lambda table: self._pool.apply(table.workers),
        )
        self._random = random.SystemRandom() if config.seed is None else random.Random(config.seed)
        self._running: dict[Generation, ModelEntry] = {}
        self._stopped = False  # the drain has timed out
        self.metrics.in_flight.set_function(lambda: self.intake.num_in_flight)
        self.metrics_page = MetricsPage(self.metrics, self._snapshot)
        self.metrics.registry.register(FleetCollector(lambda: self.metrics_page.snapshot.views))
        if config.vllm_metrics_compat:
            self.metrics.registry.register(VllmCollector(self.metrics, lambda: self.metrics_page.snapshot))

    def start(self) -> None:
        """Start watching the controller; its routing table starts the sessions."""
        self.routes.start()

    async def close(self) -> None:
        """Close every connection to the fleet."""
        await self.metrics_page.close()
        await self.routes.close()
        await self._pool.close()
        self._text_threads.close()
        self.grammars.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    async def drain(self) -> None:
        """Refuse new requests; let the running ones finish, within the configured time."""
        self.intake.draining = True
        logger.info("draining: %d requests in flight", self.intake.num_in_flight)
        if await self.intake.idle(self.config.drain_timeout_s):
            return
        self._stopped = True
        if self._running:
            logger.warning("ending %d requests after %g s", len(self._running), self.config.drain_timeout_s)
        for generation in list(self._running):
            generation.fail(DrainingError("This gateway is shutting down and could not wait for the request to end."))
        await self.intake.idle(ABORT_GRACE_S)

    @property
    def not_ready_reason(self) -> str | None:
        """Return why no request can be answered now; None if one can."""
        if self.intake.draining:
            return "draining"
        if self.routes.table is None:
            return "no routing table from the controller yet"
        if self.routes.text is None:
            return "no tokenizer from the controller yet"
        if not self._pool.has_ready_worker:
            return "no worker is ready"
        return None

    @property
    def table(self) -> RoutingTable:
        """Return the routing table. Raises WorkerUnavailableError before the first."""
        if self.routes.table is None:
            raise WorkerUnavailableError("The gateway has not heard from its controller yet. Try again in a moment.")
        return self.routes.table

    @property
    def text(self) -> ModelText:
        """Return the base model's tokenizer and template. Raises WorkerUnavailableError before the first."""
        if self.routes.text is None:
            raise WorkerUnavailableError("The model's tokenizer is still being loaded. Try again in a moment.")
        return self.routes.text

    async def served(self, find: Callable[[RoutingTable], ModelEntry]) -> ServedModel:
        """Return the model that `find` finds, with its tokenizer and template (its own, if it has one).

        Raises WorkerUnavailableError, and the errors of `find`.
        """
        table = self.table
        entry = find(table)
        text = self.text
        if entry.text_digest and entry.text_digest != text.digest:
            text = await self.routes.adapter_tokenizers.get(entry.text_digest)
        return ServedModel(entry, text, table.max_model_len)

    async def in_thread(self, tenant: Tenant, num_bytes: int, function: Callable[[], _T]) -> _T:
        """Run a call that may take long (a tokenizer, a template) off the event loop. num_bytes: its input's."""
        return await self._text_threads.run(tenant.name, num_bytes, function)

    async def parse(self, tenant: Tenant, num_bytes: int, function: Callable[[], _T]) -> _T:
        """Run a call that takes long only on a large input: on the event loop for a few bytes, else off it."""
        if num_bytes <= INLINE_BYTES:
            return function()
        return await self.in_thread(tenant, num_bytes, function)

    def draw_seed(self) -> int:
        """Return a random seed for a request without one."""
        return self._random.getrandbits(64)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            [view.frozen() for view in self._pool.views()],
            self.routes.table,
            [entry.name for model in self._running.values() for entry in model.adapters],
        )

    @asynccontextmanager
    async def generate(
        self,
        requests: Sequence[GenerateRequest],
        params: SamplingParams,
        model: ServedModel,
        *,
        shown_tokens: frozenset[int] = frozenset(),
        is_round: bool = False,
    ) -> AsyncIterator[Generation]:
        """Submit all choices of one API request's prompts; those still running when the block ends are cancelled.

        is_round: this is one of several for the request, which is counted elsewhere.
        """
        if self._stopped:
            raise DrainingError("This gateway is shutting down.")
        generation = Generation(
            requests,
            params,
            tokenizer=model.text.tokenizer,
            workers=self._pool,
            max_queued_tokens=self.config.limits.max_queued_tokens,
            worker_wait_s=self.config.worker_wait_s,
            metrics=(self._round_metrics if is_round else self.metrics).model(model.entry.name),
            shown_tokens=shown_tokens,
        )
        limit_s = self.config.limits.request_timeout_s
        timer = asyncio.get_running_loop().call_later(
            limit_s,
            lambda: generation.fail(DeadlineError(f"The request did not end within {limit_s:g} s, the limit.")),
        )
        self._running[generation] = model.entry
        try:
            with generation:
                generation.start()
                yield generation
        finally:
            timer.cancel()
            del self._running[generation]


STATE: Final = web.AppKey("state", GatewayState)
