"""Steps: what the scheduler has planned is computed, and what comes of it is told.

On one GPU steps overlap: while one runs, the next is planned and launched, whose rows take their input tokens from
where the running one will leave them. What a step brought is told when the next has been launched. If a rule that
changes logits must know the running step's tokens, the next one's forward pass is launched and its sampling waits.

Owns: the step in flight, counts of steps and tokens, the times of steps. Leaves to others: plans (scheduling/), the
computation (model/runner.py), requests before and after their steps (loop.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from lorafleet.workers.engine.slot_loader import SlotLoader
from lorafleet.workers.errors import LoRAFleetError, NonFiniteLogitsError
from lorafleet.workers.model.prompt_scores import PendingScores
from lorafleet.workers.model.rules.grammar_masks import GrammarMasks
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.model.sampling import PendingSamples, Sampled
from lorafleet.workers.scheduling.batch import StepPlan
from lorafleet.workers.scheduling.pace import PaceMeter
from lorafleet.workers.scheduling.request import FinishReason, Request, RequestEvent
from lorafleet.workers.scheduling.scheduler import Scheduler
from lorafleet.workers.scheduling.step_budget import StepBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    """A step that was launched and whose tokens are not known yet."""

    samples: PendingSamples
    scores: PendingScores | None  # of prompt tokens
    requests: list[Request]  # that sample, in the order of its rows
    num_tokens: int
    num_in_prompts: int  # of these: beside the one of each request that has some already
    launched_at: float


class Steps:
    """An engine's steps, one after the other. Used by the stepping thread only."""

    def __init__(
        self,
        *,
        runner: ModelRunner,
        scheduler: Scheduler,
        masks: GrammarMasks,
        loader: SlotLoader,
        pace: PaceMeter,
        budget: StepBudget,
    ) -> None:
        """loader, pace, budget: they are told how long each step took."""
        self.overlaps = runner.is_asynchronous
        self.began_at: float | None = None  # of the step that is to end next
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.output_tokens_of: dict[str, int] = {}  # by adapter; "" is the base model
        self._runner = runner
        self._scheduler = scheduler
        self._masks = masks
        self._loader = loader
        self._pace = pace
        self._budget = budget
        self._in_flight: _InFlight | None = None
        self._settled_at = 0.0

    @property
    def is_in_flight(self) -> bool:
        """Return whether a step's tokens are not known yet."""
        return self._in_flight is not None

    def run(self, plan: StepPlan, events: list[RequestEvent]) -> None:
        """Launch a plan, which may be empty, and append what came of a step: of the one before, if steps overlap."""
        launched = self._launch(plan, events) if plan.scheduled else None
        self._settle(events)
        if launched is not None:
            self._in_flight = launched
            self.began_at = max(launched.launched_at, self._settled_at)
            if not self.overlaps:
                self._settle(events)

    def _launch(self, plan: StepPlan, events: list[RequestEvent]) -> _InFlight:
        """Start a non-empty plan and book it as computed; its tokens are pending.

        If rules must know the tokens of the step in flight, that one is settled while this one's forward pass runs.
        """
        launched_at = time.monotonic()
        if self.began_at is None:
            self.began_at = launched_at
        forward = self._runner.forward(plan)
        if not forward.is_prepared:
            self._settle(events)
            forward = forward.keep(self._scheduler.holds)
        samples = self._runner.sample(forward)
        self.num_steps += 1
        num_in_prompts = 0
        for entry in plan.scheduled:
            request = entry.request
            num_left = request.num_prompt_tokens - request.num_computed_tokens
            self.num_prompt_tokens += max(0, min(entry.num_tokens, num_left))
            num_in_prompts += entry.num_tokens - 1
            if self._scheduler.holds(request):
                self._scheduler.advance(entry)
        return _InFlight(
            samples=samples,
            scores=forward.scores,
            requests=forward.requests,
            num_tokens=plan.num_tokens,
            num_in_prompts=num_in_prompts,
            launched_at=launched_at,
        )

    def _settle(self, events: list[RequestEvent]) -> None:
        """Wait for the step that is in flight, if one is, and append what came of it."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return
        holds = self._scheduler.holds
        for request, scored in ({} if step.scores is None else step.scores.results()).items():
            if not holds(request):
                continue
            if scored is None:
                events.append(self._end(request, _not_finite(request), is_spoiled=True))
            else:
                events.append(RequestEvent(request.request_id, prompt_logprobs=scored))
        results = list(zip(step.requests, step.samples.results(), strict=True))
        ends = self._masks.take(
            [
                (request, sampled.token_id)
                for request, sampled in results
                if request.sampling.grammar and sampled.is_usable and holds(request)
            ]
        )
        for request, sampled in results:
            if holds(request):  # else it ended while this step ran
                events.append(self._take(request, sampled, ends.get(request, False)))
        now = time.monotonic()
        step_s = now - max(step.launched_at, self._settled_at)
        self._settled_at, self.began_at = now, None
        self._loader.book_step(step_s)
        self._pace.book_step(step_s, step.num_in_prompts)
        self._budget.book(step_s, step.num_tokens)

    def _take(self, request: Request, sampled: Sampled, is_complete: bool | LoRAFleetError) -> RequestEvent:
        """Return what one row's result means for its request. is_complete: whether its grammar allows nothing more."""
        if not sampled.is_finite:
            return self._end(request, _not_finite(request), is_spoiled=True)
        if sampled.error is not None:
            return self._end(request, sampled.error)
        if isinstance(is_complete, LoRAFleetError):
            return self._end(request, is_complete)
        is_first = request.num_known_tokens == request.num_prompt_tokens
        finish = self._scheduler.settle(request, sampled.token_id, is_complete=is_complete)
        if finish is not None:
            self._pace.book_seat(time.monotonic() - request.started_at)
        num_cached = request.num_cached_tokens or 0
        if not request.sampling.max_tokens:
            return RequestEvent(request.request_id, finish=finish, num_cached_tokens=num_cached)
        self.num_output_tokens += 1
        for digest in request.digests or ("",):
            self.output_tokens_of[digest] = self.output_tokens_of.get(digest, 0) + 1
        event = RequestEvent(request.request_id, sampled.token_id, logprobs=sampled.logprobs, finish=finish)
        return replace(event, num_cached_tokens=num_cached) if is_first and num_cached else event

    def _end(self, request: Request, error: LoRAFleetError, *, is_spoiled: bool = False) -> RequestEvent:
        self._scheduler.remove(request.request_id, is_spoiled=is_spoiled)
        return RequestEvent(request.request_id, finish=FinishReason.ERROR, error=error)


def _not_finite(request: Request) -> NonFiniteLogitsError:
    adapter = f"adapter {request.adapter}" if request.adapter else "the base model"
    return NonFiniteLogitsError(f"{adapter} gave NaN or infinite logits for this request.")
