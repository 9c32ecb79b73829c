"""The engine: where deciding meets executing.

`Engine` is stepped by one thread (`LLMEngine` does so itself, others through thread.py). `submit`, `cancel`,
`register_adapter`, `unregister_adapter` and `stats` may be called from any thread: what they ask for lands in an inbox
that the next step drains. No step ever waits for an adapter: loads run on threads of their own and report through the
same inbox.

Every accepted request ends in exactly one event with a `finish`, unless a step raises: then the engine has failed, and
whoever asks it for anything is told.

Owns: the inbox, requests from acceptance to their end. Leaves to others: plans (scheduling/), steps (steps.py), loads
(slot_loader.py), registered adapters (registered.py), grammars (grammars.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorafleet.kernels import native
from lorafleet.workers.adapters.format import AdapterSpec
from lorafleet.workers.adapters.open_files import OpenAdapter
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.cores import CoreClaim, claim_cores
from lorafleet.workers.engine.grammars import Compiled, Grammars, TokenizerSource
from lorafleet.workers.engine.registered import FreedBytes, RegisteredAdapters, Retire
from lorafleet.workers.engine.slot_loader import Fetched, Loaded, SlotLoader
from lorafleet.workers.engine.steps import Steps
from lorafleet.workers.errors import (
    DrainingError,
    InternalError,
    LoRAFleetError,
    QueueFullError,
)
from lorafleet.workers.model.adapter_shard import adapter_store
from lorafleet.workers.model.architecture import ModelSpec, read_model_spec
from lorafleet.workers.model.device import measure_memory, pick_device
from lorafleet.workers.model.memory_plan import MemoryPlan, plan_memory
from lorafleet.workers.model.rules.grammar_masks import GrammarMasks
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.ranks.ranks import Gather, Ranks, alone
from lorafleet.workers.scheduling.accepted import AcceptedRequests
from lorafleet.workers.scheduling.activation import find_start
from lorafleet.workers.scheduling.adapter_slots import AdapterSlots
from lorafleet.workers.scheduling.backlog import Backlog
from lorafleet.workers.scheduling.batch import StepPlan
from lorafleet.workers.scheduling.block_pool import BlockPool
from lorafleet.workers.scheduling.eviction import make_eviction
from lorafleet.workers.scheduling.pace import PaceMeter
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest, Request, RequestEvent
from lorafleet.workers.scheduling.request_checks import RequestChecks
from lorafleet.workers.scheduling.scheduler import Scheduler
from lorafleet.workers.scheduling.stats import EngineStats
from lorafleet.workers.scheduling.step_budget import StepBudget
from lorafleet.workers.scheduling.stuck_watch import LOOK_AGAIN_S, StuckWatch
from lorafleet.workers.scheduling.turns import WaitBound

logger = logging.getLogger(__name__)

_MAX_PLANNED = 4096  # waiting requests that the scheduler knows; others wait before it (scheduling/backlog.py)
_MAX_ARRIVALS = 256  # that it gets to know in one step, which takes some 10 ms


@dataclass(frozen=True, slots=True)
class _Pin:
    """A user's wish that an adapter stays in its slot, or its end."""

    digest: str
    is_pinned: bool


class Engine:
    """One model, its adapters, its requests. Create with `from_config`, then `load`."""

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, memory: MemoryPlan, device: torch.device, ranks: Ranks
    ) -> None:
        lora = config.lora
        self.config = config
        self.spec = spec
        self.memory = memory
        self.max_model_len = memory.max_model_len
        self.vocab_size = spec.vocab_size
        self._max_lora_rank = lora.max_lora_rank if lora else 0
        self._ranks = ranks
        self._masks = GrammarMasks(num_threads=max(1, min(4, config.threads // 2)))
        self._grammars = Grammars(Path(config.model), self._masks, report=self._post)
        self._runner = ModelRunner(
            spec,
            memory,
            max_lora_rank=self._max_lora_rank,
            device=device,
            group=ranks.group,
            plans=ranks.plans,
            enforce_eager=config.enforce_eager,
            rules=[self._masks],
        )
        self._pool = BlockPool(memory.num_pages)
        eviction = lora.lora_eviction if lora else "lru"
        self._slots = AdapterSlots(
            memory.max_loras,
            max_bytes=memory.full_weight_bytes,
            bytes_of=self._full_weight_bytes,
            eviction=make_eviction(eviction),
        )
        self._step_budget = StepBudget(memory.max_num_batched_tokens)
        self._scheduler = Scheduler(
            self._pool,
            self._slots,
            page_size=memory.page_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=memory.max_num_batched_tokens,
            eos_token_ids=spec.eos_token_ids,
            max_wait_s=config.max_adapter_wait_s,
            enable_prefix_caching=config.enable_prefix_caching,
            is_in_host=lambda digest: self._store.is_resident(digest),
            max_shared_tokens=lambda: self._step_budget.num_tokens,
        )
        self._store = adapter_store(
            spec,
            memory,
            ranks.group,
            eviction=make_eviction(eviction),
            need_of=self._scheduler.need_of,
            read_timeout_s=config.adapter_read_timeout_s,
            has_read=self._look_again,
        )
        self._pace = PaceMeter()
        self._loader = SlotLoader(
            store=self._store,
            slots=self._slots,
            runner=self._runner,
            followers=ranks.followers,
            pace=self._pace,
            report=self._post,
        )
        self._steps = Steps(
            runner=self._runner,
            scheduler=self._scheduler,
            masks=self._masks,
            loader=self._loader,
            pace=self._pace,
            budget=self._step_budget,
        )
        self._checks = RequestChecks(
            max_model_len=memory.max_model_len,
            max_loras=memory.max_loras,
            vocab_size_of=self.vocab_size_of,
            not_composable=lambda digest: self._adapters.spec(digest).not_composable,
        )
        self._lock = threading.Lock()  # guards the seven below
        # A str is the id of a request to cancel.
        self._inbox: deque[GenerateRequest | str | Loaded | Fetched | Compiled | Retire | _Pin] = deque()
        self._adapters = RegisteredAdapters(
            config, spec=spec, memory=memory, store=self._store, slots=self._slots, followers=ranks.followers
        )
        self._wake = threading.Condition(self._lock)
        self._accepted = AcceptedRequests(
            WaitBound(config.max_adapter_wait_s, memory.max_loras, config.max_num_seqs), max_waiting=config.max_waiting
        )
        self._closed = False
        self._failure: LoRAFleetError | None = None  # a step has raised; there are no more
        self._looks_again = False  # the last step found requests that wait, and nothing to do for any of them
        self._stuck_watch = StuckWatch()
        self._backlog = Backlog()
        self._is_warm = False
        self._cores: CoreClaim | None = None
        self._arrivals = 0
        self._stats = self._take_stats()

    @classmethod
    def from_config(cls, config: EngineConfig, gather: Gather = alone) -> Engine:
        """Plan the memory and allocate it; the weights come with `load`.

        gather: brings up the other ranks, with a tensor_parallel_size above 1. Raises `ConfigError`, `ModelError` or
        `MemoryPlanError`; nothing is allocated then.
        """
        spec = read_model_spec(Path(config.model))
        device = pick_device(config)
        dtype = config.compute_dtype(spec.dtype, on_cpu=device.type == "cpu")
        memory = plan_memory(spec, config, measure_memory(device), dtype=dtype, lora_dtype=config.adapter_dtype(dtype))
        return cls(config, spec, memory, device, gather(memory, device))

    def load(self) -> None:
        """Read the base model's weights. Raises `ModelError`."""
        # With one thread: a team of OpenMP threads belongs to the thread that calls in and stays with it, and where two
        # teams share the cores, libgomp sends threads to sleep at every barrier. Steps would take twice as long.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._runner.load(Path(self.config.model))
        finally:
            torch.set_num_threads(num_threads)

    def use_tokenizers(self, tokenizer_of: TokenizerSource) -> None:
        """Take the source of adapters' own tokenizers, by digest, for requests with a grammar.

        tokenizer_of: called on a thread; returns None for a digest that is not known any more.
        """
        self._grammars.vocabularies.tokenizer_of = tokenizer_of

    def prepare_grammars(self) -> None:
        """Read the base model's vocabulary, for which the first request with a grammar would stop the steps."""
        self._grammars.prepare()

    def describe(self) -> list[str]:
        """The memory plan and what computes, line by line, for people."""
        on_cpu = [f"  {'CPU kernels':<32}{native.describe()}"] if self.memory.device == "cpu" else []
        return [*self.memory.lines(), *on_cpu]

    # Any thread.

    def register_adapter(self, path_or_id: str, *, roots: Sequence[str] | None = None) -> AdapterSpec:
        """Find, read and verify an adapter, so that requests may name its digest. Slow: it reads the file.

        Idempotent; the same content gives the same digest. roots: where it must lie, see `resolve_adapter`. Raises
        `AdapterRefusedError`.
        """
        spec = self.read_adapter(path_or_id, roots=roots)
        self.add_adapter(spec)
        return spec

    def read_adapter(self, path_or_id: str, *, roots: Sequence[str] | None = None) -> AdapterSpec:
        """The slow part of `register_adapter`: afterwards nothing is registered yet."""
        return self._adapters.read(path_or_id, roots)

    def add_adapter(self, spec: AdapterSpec) -> None:
        """Let requests name what `read_adapter` has read. Raises `AdapterRefusedError`."""
        with self._lock:
            self._check_open()
            self._adapters.add(spec)

    def unregister_adapter(self, digest: str) -> Future[FreedBytes]:
        """Accept no more requests for an adapter; free its slot and host memory when those accepted have ended.

        The future is done in the step that frees it. Registered again before that, the adapter stays, and nothing is
        freed. Raises `UnknownModelError` for a digest that is not registered.
        """
        with self._lock:
            self._check_open()
            retire = self._adapters.remove(digest)
            self._inbox.append(retire)
            self._wake.notify()
        return retire.freed

    def prefetch_adapter(self, digest: str) -> None:
        """Bring a registered adapter into the host cache in the background, if there is room."""
        self._store.prefetch(digest)
        self._ranks.followers.prefetch(digest)

    def pin_adapter(self, digest: str) -> None:
        """Bring a registered adapter into a slot as soon as one is free, and keep it there until it is unregistered.

        Raises `AdapterConflictError` when every slot but one is taken so: other adapters need one to take turns in.
        """
        self.repin_adapters({digest})

    def repin_adapters(self, pin: Collection[str], unpin: Collection[str] = ()) -> None:
        """`pin_adapter` some in place of others, which may be evicted from then on. Raises what that raises; all others
        stay as they are then."""
        with self._lock:
            self._check_open()
            changes = self._adapters.repin(pin, unpin, self._accepted.adapters())
            self._inbox += [_Pin(digest, is_pinned) for digest, is_pinned in changes]
            self._wake.notify()

    def vocab_size_of(self, adapter: str | None) -> int:
        """Return the number of token ids a request may hold: the base model's, and those that its adapter adds.

        Raises `AdapterUnavailableError` for an unregistered digest.
        """
        if adapter is None:
            return self.vocab_size
        return self._adapters.spec(adapter).vocab_size

    def submit(self, request: GenerateRequest, *, waits_for_files: bool = True) -> None:
        """Accept a request; its events come out of later steps.

        waits_for_files: until those of its adapter are open, which then may be replaced; an event loop has no time for
        that.

        Raises `InvalidRequestError`, `ContextLengthError`, `AdapterUnavailableError` (an unregistered digest),
        `AdapterRefusedError` (one that is not applied together with others), `AdapterConflictError` (pinned ones leave
        too little room), `QueueFullError` (too many requests, or more flows than max_adapter_wait_s could be kept
        for), `DrainingError` or `InternalError` (the engine is closed, or has failed); the request is then not accepted
        and has no events.
        """
        self._checks.check(request)
        opened = self._accept(self._activated(request))
        if waits_for_files and opened:
            wait(opened)

    def cancel(self, request_id: str) -> None:
        """End a request with CANCELLED at the next step; it then holds nothing. No effect on one that has ended."""
        with self._lock:
            self._inbox.append(request_id)
            self._wake.notify()

    def stats(self) -> EngineStats:
        """The snapshot of the last step's end, with the age of the step that runs now."""
        began = self._steps.began_at
        store = self._store.stats()
        with self._lock:
            registered, requests_of = self._adapters.all(), self._adapters.num_requests()
        # What grows with the number of adapters is looked at here: a step takes a snapshot and must stay cheap.
        return replace(
            self._stats,
            host_adapters=self._store.resident(),
            registered_adapters=registered,
            requests_of=requests_of,
            output_tokens_of=self._steps.output_tokens_of.copy(),
            host_cache_bytes=store.bytes,
            host_cache_usage=store.usage,
            num_adapter_loads=store.loads,
            pace=self._pace.pace(),
            last_step_age_s=0.0 if began is None else time.monotonic() - began,
        )

    def has_unfinished(self) -> bool:
        with self._lock:
            return len(self._accepted) > 0

    def close(self) -> None:
        """Take no more requests and stop the threads; a read that hangs is left to itself. Nobody steps any more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._abandon(_closed())
        self._store.close()
        self._loader.close()
        self._grammars.close()
        self._masks.close()
        self._ranks.followers.close()  # before they are told to end: an end that is wanted is no loss
        self._runner.close()
        if self._cores is not None:
            self._cores.close()

    def fail(self) -> None:
        """There are no more steps: whatever is asked of the engine, and whatever is awaited, ends with an error."""
        with self._lock:
            self._failure = self._failure or InternalError(
                "A step of the engine failed; the log says why. Create another one."
            )
            self._abandon(self._failure)

    # The stepping thread.

    def bind_thread(self) -> None:
        """Give the calling thread the engine's CPU threads; the first time, run the model once.

        The threads belong to the one that calls in, so one thread should make all the steps.
        """
        self._runner.use_threads(self.config.threads)
        if not self._is_warm:
            self._is_warm = True
            self._runner.warm_up()

    def take_cores(self) -> None:
        """Let the calling thread, which is the engine's alone, compute on cores that no other rank of this host takes.

        Before `bind_thread`, and only where ranks share a host's cores.
        """
        if self.memory.device == "cpu" and self.config.ranks_per_host > 1 and self._cores is None:
            self._cores = claim_cores(self.config.threads)
            self._cores.pin_thread()

    def wait_for_work(self, timeout_s: float | None = None) -> bool:
        """Sleep until there is something to do: a message, or a request that can run. False on timeout or close."""
        with self._lock:
            looks_again = self._looks_again and (timeout_s is None or timeout_s >= LOOK_AGAIN_S)
            has_work = self._wake.wait_for(
                lambda: self._closed or self._has_work(), LOOK_AGAIN_S if looks_again else timeout_s
            )
            return (has_work or looks_again) and not self._closed

    def wake(self) -> None:
        """Let a sleeping `wait_for_work` look again."""
        with self._lock:
            self._wake.notify_all()

    def step(self) -> list[RequestEvent]:
        """Drain the inbox, run one step, say what came of it. Without runnable requests it returns at once.

        Where steps overlap it launches one and says what came of the one before. After one that raised there are no
        more: whatever is asked of the engine then raises `InternalError`.
        """
        with self._lock:
            self._check_open()
        try:
            return self._step()
        except Exception:
            self.fail()
            raise

    def _step(self) -> list[RequestEvent]:
        events: list[RequestEvent] = []
        self._drain(events)
        self._fill_scheduler()
        self._loader.copy(puts_off=self._scheduler.num_running > 0)
        plan = self._scheduler.schedule()
        self._loader.clear_emptied()
        for load in plan.loads:
            self._loader.start(load)
        for digest in plan.prefetches:
            self._loader.fetch(digest)
        self._steps.run(plan, events)
        self._give_up(events)
        self._look_for_stuck(plan, events)
        with self._lock:
            ended = [self._accepted.end(event.request_id) for event in events if event.finish is not None]
            for gone in ended:
                self._adapters.leave(gone.digests)
            admission = self._accepted.admission
            admission.num_served_flows = self._scheduler.num_served_flows
            admission.num_served_turns = self._scheduler.num_served_turns
            admission.slot_turns = self._scheduler.slot_turns
            admission.num_base_seats = self._scheduler.num_base_seats
            admission.hot = self._slots.occupants()
        for gone in ended:
            self._release_files(gone)
        self._free_retired()
        self._stats = self._take_stats()
        return events

    def check_integrity(self) -> None:
        """Nothing is leaked. For tests, between steps."""
        self._scheduler.check_integrity()
        with self._lock:
            queued = {message.request_id for message in self._inbox if isinstance(message, GenerateRequest)}
            queued.update(self._backlog)
            queued.update(request_id for request_id in self._accepted if request_id in self._grammars)
            assert all(request_id in self._scheduler or request_id in queued for request_id in self._accepted)
            assert set(self._accepted) >= set(self._backlog)
            self._adapters.check_integrity([message for message in self._inbox if isinstance(message, Retire)])

    def _accept(self, request: GenerateRequest) -> list[Future[OpenAdapter | None]]:
        """The files of its adapters, which are opened for it from now on; for one that is refused, none are."""
        with self._lock:
            self._check_open()
            # Under the lock that the inbox has, so that every request for an adapter comes before its retirement.
            self._adapters.check(*request.digests)
            self._accepted.add(request)
            opened = [self._store.hold_files(digest) for digest in request.digests]  # on other threads
            self._adapters.use(request.digests)
            self._inbox.append(request)
            self._wake.notify()
        return opened

    def _check_open(self) -> None:
        """The lock is held. Raises `DrainingError`, or `InternalError`."""
        if self._closed:
            raise _closed()
        if self._failure is not None:
            raise self._failure

    def _abandon(self, error: LoRAFleetError) -> None:
        """Tell those who wait for the stepping thread that it does nothing any more. The lock is held."""
        self._adapters.close([message for message in self._inbox if isinstance(message, Retire)], error)
        self._inbox.clear()
        self._accepted.clear()
        self._wake.notify_all()

    def _look_again(self) -> None:
        """Something that was read may have been waited for. On a reading thread."""
        with self._lock:
            self._looks_again = False
            self._wake.notify_all()

    def _release_files(self, request: GenerateRequest) -> None:
        for digest in request.digests:
            self._store.release_files(digest)

    def _activated(self, request: GenerateRequest) -> GenerateRequest:
        """The same, with the place where an activated adapter begins; if it does not, a request for the base model."""
        spec = None if request.adapter is None else self._store.spec(request.adapter)
        if spec is None or not spec.config.invocation_tokens:
            return request
        start = find_start(request.prompt_token_ids, spec.config.invocation_tokens)
        if start is None:
            return replace(request, adapter=None)
        return replace(request, adapter_start=start)

    def _full_weight_bytes(self, digest: str) -> int:
        """Return the bytes that a registered adapter takes of the pool beside the slots."""
        spec = self._store.spec(digest)
        return 0 if spec is None else self.memory.full_weight_bytes_of(self.spec, spec.vocabulary)

    def _has_work(self) -> bool:
        # Waiting requests alone are no work while their adapters load: the loaders' reports wake the loop.
        return (
            bool(self._inbox)
            or self._steps.is_in_flight
            or self._loader.is_copying
            or (len(self._backlog) > 0 and self._scheduler.num_waiting < _MAX_PLANNED)
            or self._scheduler.num_running > 0
            or (self._scheduler.num_waiting > 0 and self._loader.num_coming == 0 and not self._looks_again)
            or self._scheduler.is_overdue
            or self._adapters.can_free(self._is_coming)
        )

    def _drain(self, events: list[RequestEvent]) -> None:
        with self._lock:
            messages = list(self._inbox)
            self._inbox.clear()
        for message in messages:
            if isinstance(message, GenerateRequest):
                if self._grammars.admit(message):
                    self._backlog.add(message)
            elif isinstance(message, Compiled):
                self._take_compiled(message, events)
            elif isinstance(message, Loaded):
                self._take_loaded(message, events)
            elif isinstance(message, Fetched):
                self._take_fetched(message, events)
            elif isinstance(message, Retire):
                self._adapters.retire(message)
            elif isinstance(message, _Pin):
                self._loader.pin(message.digest, message.is_pinned)
            elif self._grammars.discard(message) or self._backlog.discard(message) or self._scheduler.remove(message):
                events.append(RequestEvent(message, finish=FinishReason.CANCELLED))

    def _fill_scheduler(self) -> None:
        for _ in range(min(_MAX_ARRIVALS, _MAX_PLANNED - self._scheduler.num_waiting)):
            request = self._backlog.take()
            if request is None:
                return
            self._arrivals += 1
            arrived = Request.from_generate(request, self._arrivals)
            self._grammars.begin(arrived)
            self._scheduler.add(arrived)

    def _look_for_stuck(self, plan: StepPlan, events: list[RequestEvent]) -> None:
        """End the request that has waited longest, if all have been stuck for too long."""
        is_idle = not (plan.scheduled or plan.loads or self._steps.is_in_flight or self._loader.num_coming)
        looks_again = is_idle and self._scheduler.num_waiting > 0
        with self._lock:
            self._looks_again = looks_again
        watch = self._stuck_watch
        if not watch.is_stuck(time.monotonic(), is_idle=looks_again and not self._store.num_reading):
            return
        with self._lock:
            request_id = next(known for known in self._accepted if known in self._scheduler)
        logger.error("request %s waits though nothing runs, loads or is read; it is ended", request_id)
        self._scheduler.remove(request_id)
        error = InternalError(
            f"For {watch.stuck_s:g} s the request could not begin though nothing else ran. Try again."
        )
        events.append(RequestEvent(request_id, finish=FinishReason.ERROR, error=error))

    def _take_loaded(self, loaded: Loaded, events: list[RequestEvent]) -> None:
        error = self._loader.take(loaded)
        if error is not None:
            self._fail(self._scheduler.waiting_for(loaded.load.digest), error, events)

    def _take_compiled(self, compiled: Compiled, events: list[RequestEvent]) -> None:
        for request in self._grammars.take(compiled):
            if isinstance(compiled.grammar, LoRAFleetError):
                events.append(RequestEvent(request.request_id, finish=FinishReason.ERROR, error=compiled.grammar))
            else:
                self._backlog.add(request)

    def _take_fetched(self, fetched: Fetched, events: list[RequestEvent]) -> None:
        error = self._loader.take_fetched(fetched)
        if error is None:
            self._scheduler.come(fetched.digest)
        else:
            self._fail(self._scheduler.waiting_for(fetched.digest), error, events)

    def _give_up(self, events: list[RequestEvent]) -> None:
        """Refuse what has waited for too long to be served in time."""
        overdue = self._scheduler.overdue()
        if overdue:
            error = QueueFullError(
                f"There was no turn for the request within --max-adapter-wait-s {self.config.max_adapter_wait_s:g}: "
                "too many wait, or adapters load too slowly. Try again later."
            )
            self._fail(overdue, error, events)

    def _fail(self, request_ids: list[str], error: LoRAFleetError, events: list[RequestEvent]) -> None:
        for request_id in request_ids:
            self._scheduler.remove(request_id)
            events.append(RequestEvent(request_id, finish=FinishReason.ERROR, error=error))

    def _is_coming(self, digest: str) -> bool:
        """Return whether an adapter is on its way into host memory or a slot."""
        return self._slots.is_loading(digest) or self._loader.is_fetching(digest)

    def _free_retired(self) -> None:
        with self._lock:
            freed = self._adapters.free_unused(self._is_coming)
        self._loader.clear_emptied()
        for retire, num_bytes in freed:
            self._steps.output_tokens_of.pop(retire.digest, None)
            retire.freed.set_result(num_bytes)

    def _post(self, report: Loaded | Fetched | Compiled) -> None:
        """Put a report into the inbox. On any thread."""
        with self._lock:
            self._inbox.append(report)
            self._wake.notify()

    def _take_stats(self) -> EngineStats:
        with self._lock:
            queued = sum(isinstance(message, GenerateRequest) for message in self._inbox)
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + len(self._backlog) + len(self._grammars) + queued,
            num_uncomputed_tokens=self._scheduler.num_uncomputed_tokens,
            page_size=self.memory.page_size,
            num_pages=self._pool.num_pages,
            num_free_pages=self._pool.num_free,
            device_adapters=self._slots.resident(),
            loading_adapters=self._slots.loading(),
            num_steps=self._steps.num_steps,
            num_prompt_tokens=self._steps.num_prompt_tokens,
            num_output_tokens=self._steps.num_output_tokens,
            num_preemptions=self._scheduler.num_preemptions,
            num_prefix_query_tokens=self._scheduler.num_prefix_query_tokens,
            num_prefix_hit_tokens=self._scheduler.num_prefix_hit_tokens,
            num_slot_loads=self._loader.num_loaded,
        )


def _closed() -> DrainingError:
    return DrainingError("The engine is closed. Create another one.")
