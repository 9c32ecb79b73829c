"""A scheduler with a model that says nothing: what the tests of the engine's decisions play."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorafleet.workers.engine.adapter_slots import AdapterSlots
from lorafleet.workers.engine.batch import StepPlan
from lorafleet.workers.engine.block_pool import BlockPool
from lorafleet.workers.engine.request import FinishReason, GenerateRequest, Request, SamplingOptions
from lorafleet.workers.engine.scheduler import Scheduler

EOS = 1
PAGE = 4


class World:
    """A scheduler with a model that always says token 7 (or EOS where told) and adapters that load at once or later."""

    def __init__(
        self,
        *,
        pages: int = 64,
        slots: int = 2,
        max_num_seqs: int = 4,
        budget: int = 16,
        auto_load: bool = True,
        step_s: float = 1.0,
        max_wait_s: float = 0.0,
        max_bytes: int = 0,
        sizes: dict[str, int] | None = None,
        prefix_caching: bool = False,
        host: set[str] | None = None,
        shared_budget: int | None = None,
    ) -> None:
        """`sizes`: bytes of adapters with an embedding or a head of their own, of which there may be `max_bytes`.
        `host`: the adapters in host memory, which the test may change; None is all. `shared_budget`: tokens of a step
        while several tenants have requests; None is `budget`.
        """
        self.now = 0.0
        self.step_s = step_s
        self.slots = AdapterSlots(slots, max_bytes=max_bytes, bytes_of=lambda digest: (sizes or {}).get(digest, 0))
        self.pool = BlockPool(pages)
        self.scheduler = Scheduler(
            self.pool,
            self.slots,
            page_size=PAGE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            eos_token_ids=frozenset([EOS]),
            max_wait_s=max_wait_s,
            enable_prefix_caching=prefix_caching,
            is_in_host=lambda digest: host is None or digest in host,
            max_shared_tokens=None if shared_budget is None else lambda: shared_budget,
            clock=lambda: self.now,
        )
        self.auto_load = auto_load
        self.finished: dict[str, FinishReason] = {}
        self.order: list[str] = []  # ids by first appearance in a step
        self._arrivals = 0

    def add(self, name: str, prompt: int, max_tokens: int = 4, adapter: str | None = None, **fields: Any) -> Request:
        """fields: of GenerateRequest."""
        self._arrivals += 1
        generate = GenerateRequest(name, (7,) * prompt, SamplingOptions(max_tokens=max_tokens), adapter, **fields)
        request = Request.from_generate(generate, self._arrivals)
        self.scheduler.add(request)
        return request

    def step(self, token: Callable[[Request], int] = lambda request: 7) -> StepPlan:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        for entry in plan.scheduled:
            assert entry.num_tokens >= 1
            assert entry.slots == tuple(self.slots.slot_of(digest) for digest in entry.request.digests)
            if entry.request.request_id not in self.order:
                self.order.append(entry.request.request_id)
            reason = self.scheduler.commit(entry, token(entry.request) if entry.samples else None)
            if reason is not None:
                assert entry.request.request_id not in self.finished
                self.finished[entry.request.request_id] = reason
        self.now += self.step_s
        if self.auto_load:
            for load in plan.loads:
                self.slots.finish_load(load.digest)
        self.scheduler.check_integrity()
        return plan

    def run(self, max_steps: int = 10_000) -> int:
        for step in range(max_steps):
            if not self.scheduler.num_running and not self.scheduler.num_waiting:
                return step
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")


def tokens(plan: StepPlan) -> dict[str, int]:
    return {entry.request.request_id: entry.num_tokens for entry in plan.scheduled}


def pair(*digests: str, weight: float = 0.5) -> dict[str, Any]:
    """A composition, as fields of a request."""
    return {"composition": tuple((digest, weight) for digest in digests)}
