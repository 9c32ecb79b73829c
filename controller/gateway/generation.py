"""The life of one API request behind its parsing: its choices on their workers, and their tokens as text.

Owns: submitting, turning arrived tokens into deltas, finish reasons, cancelling whatever is not needed any more.
Leaves to others: parsing and tokenising (completions.py, chat.py), framing (sse.py), the workers (pool.py).

A choice that no worker can take now waits for one, within a limit. One whose worker is lost goes on with another one,
where its tokens so far count as its own output, so that the client sees no seam. However a request ends (finished, stop
string, error, client gone, shutdown), leaving the ``with`` block cancels on the workers what still runs there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from lorafleet.controller.gateway.inbox import ChoiceQueue, Inbox
from lorafleet.controller.gateway.metrics import ModelMetrics
from lorafleet.controller.gateway.routing_table import ModelEntry
from lorafleet.controller.gateway.session import WorkerSession
from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.proto import worker_pb2
from lorafleet.workers.engine.request import FinishReason, TokenLogprobs
from lorafleet.workers.errors import LoRAFleetError, WorkerLostError, WorkerUnavailableError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.text.output import OutputText
from lorafleet.workers.text.tokenizer import Tokenizer

MAX_LOST = 3  # workers that one choice may outlive
_RETRY_S = 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one choice has gained. logprobs: empty, or one for each token. A delta with a finish_reason is the last."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None  # the stop string or the caller's stop token


@dataclass(slots=True, eq=False)
class _Choice:
    queue: ChoiceQueue
    text: OutputText
    choose: Callable[[], WorkerSession]
    generate: worker_pb2.Generate
    session: WorkerSession | None = None  # where it was submitted
    stream: int = 0
    num_lost: int = 0  # workers that it was on
    waiting: asyncio.Task[None] | None = None  # for a worker
    last_at: float | None = None  # when its last tokens came

    def cancel(self) -> None:
        """Nobody wants more of it."""
        if self.waiting is not None:
            self.waiting.cancel()
        if self.session is not None:
            self.session.cancel(self.stream)

    def submit(self, session: WorkerSession) -> None:
        """Send it to a worker. Raises WorkerUnavailableError."""
        self.stream = session.submit(self.queue, self.generate)
        self.session = session


class Generation:
    """One request's choices. Add them, then call `next` until it returns nothing. One task uses it."""

    def __init__(
        self,
        *,
        request_id: str,
        tenant: Tenant,
        priority: int,
        cache_salt: str,
        tokenizer: Tokenizer,
        params: SamplingParams,
        max_queued_tokens: int,
        worker_wait_s: float,
        metrics: ModelMetrics,
    ) -> None:
        """worker_wait_s: how long a choice may wait for a worker that takes it, or goes on with it."""
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self._request_id = request_id
        self._tenant = tenant
        self._priority = priority
        self._cache_salt = cache_salt
        self._tokenizer = tokenizer
        self._params = params
        self._metrics = metrics
        self._started_at = time.monotonic()
        self._has_token = False
        self._worker_wait_s = worker_wait_s
        self._inbox = Inbox(max_queued_tokens, self._cancel_all, self._lost)
        self._choices: list[_Choice] = []
        self._choices_by_prompt: list[list[_Choice]] = []
        self._num_open = 0

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompts that were computed for no choice."""
        return sum(min(choice.queue.num_cached_tokens for choice in choices) for choices in self._choices_by_prompt)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cancel_all()
        if isinstance(error, ConnectionError | asyncio.CancelledError):  # the client went away
            self._metrics.ended("abort")
        elif error is not None or self._num_open:
            self._metrics.ended("error")
        else:
            seconds = time.monotonic() - self._started_at
            self._metrics.finished(seconds, self.num_prompt_tokens, self.num_cached_tokens)

    def fail(self, error: LoRAFleetError) -> None:
        """End the request from outside: `next` raises `error` after what has already arrived."""
        self._inbox.fail(error)

    def add_prompt(
        self,
        choose: Callable[[], WorkerSession],
        model: ModelEntry,
        prompt_token_ids: Sequence[int],
        samplings: Sequence[worker_pb2.Sampling],
    ) -> None:
        """Start one choice for each of `samplings`, all on one worker if one can take them now.

        choose: gives a worker's session, or raises WorkerUnavailableError, or why none will ever take it.
        """
        params = self._params
        session = None
        self.num_prompt_tokens += len(prompt_token_ids)
        first = len(self._choices)
        for sampling in samplings:
            queue = self._inbox.open_queue(len(self._choices))
            generate = worker_pb2.Generate(
                request_id=self._request_id,
                adapter_digest=model.digest,
                prompt_token_ids=prompt_token_ids,
                sampling=sampling,
                tenant=self._tenant.name,
                tenant_weight=self._tenant.weight,
                adapter_weight=model.weight,
                priority=self._priority,
                cache_salt=self._cache_salt,
                composition=[
                    worker_pb2.ComposedAdapter(digest=entry.digest, weight=weight)
                    for entry, weight in model.composition
                ],
            )
            text = OutputText(
                self._tokenizer,
                prompt_token_ids[-16:],
                stop=params.stops,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
            )
            choice = _Choice(queue, text, choose, generate)
            try:
                session = session or choose()
                choice.submit(session)
            except WorkerUnavailableError as error:
                self._wait(choice, error)
            self._choices.append(choice)
            self._num_open += 1
        self._choices_by_prompt.append(self._choices[first:])

    async def next(self) -> list[ChoiceDelta]:
        """What has come since the last call, one delta for each choice that gained something; empty at the end.

        Waits for it. Raises the error that ended the request.
        """
        deltas: list[ChoiceDelta] = []
        while self._num_open and not deltas:
            for queue in await self._inbox.take():
                delta = self._advance(self._choices[queue.index])
                if delta.text or delta.logprobs or delta.finish_reason is not None:
                    deltas.append(delta)
        return deltas

    async def gather(self) -> list[ChoiceDelta]:
        """All of every choice, once all have ended."""
        texts: list[list[str]] = [[] for _ in self._choices]
        token_ids: list[list[int]] = [[] for _ in self._choices]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in self._choices]
        last: dict[int, ChoiceDelta] = {}
        while deltas := await self.next():
            for delta in deltas:
                texts[delta.index].append(delta.text)
                token_ids[delta.index].extend(delta.token_ids)
                logprobs[delta.index].extend(delta.logprobs)
                last[delta.index] = delta
        return [
            ChoiceDelta(
                index,
                "".join(texts[index]),
                token_ids[index],
                logprobs[index],
                last[index].finish_reason,
                last[index].stop_reason,
            )
            for index in range(len(self._choices))
        ]

    def _advance(self, choice: _Choice) -> ChoiceDelta:
        token_ids, logprobs, finish = choice.queue.take()
        at = time.monotonic()
        if choice.last_at is not None:
            self._metrics.gap(at - choice.last_at)
        elif not self._has_token:
            self._has_token = True
            self._metrics.first_token(at - self._started_at)
        choice.last_at = at
        params = self._params
        by_token = finish is FinishReason.STOP
        delta = choice.text.push(
            token_ids, finish is not None, hide_last=by_token and not params.include_stop_str_in_output
        )
        reason: Literal["stop", "length"] | None = None
        stop_reason: str | int | None = delta.stop_reason
        if stop_reason is not None or by_token:
            reason = "stop"
            if stop_reason is None and token_ids[-1] in params.stop_ids:
                stop_reason = token_ids[-1]
        elif finish is not None:
            reason = "length"
        num_used = delta.num_tokens_used
        self.num_output_tokens += num_used
        self._metrics.tokens(num_used)
        if reason is not None:
            self._num_open -= 1
            self._metrics.ended(reason)
            choice.cancel()
        if num_used != len(token_ids):
            token_ids, logprobs = token_ids[:num_used], logprobs[:num_used]
        return ChoiceDelta(choice.queue.index, delta.text, token_ids, logprobs, reason, stop_reason)

    def _cancel_all(self) -> None:
        for choice in self._choices:
            choice.cancel()

    def _lost(self, queue: ChoiceQueue, error: LoRAFleetError) -> None:
        choice = self._choices[queue.index]
        choice.num_lost += isinstance(error, WorkerLostError)
        if choice.num_lost > MAX_LOST:  # it may be what they die of
            self._inbox.fail(error)
            return
        del choice.generate.output_token_ids[:]
        choice.generate.output_token_ids.extend(choice.queue.received)
        self._wait(choice, error)

    def _wait(self, choice: _Choice, error: LoRAFleetError) -> None:
        """Let a choice go to a worker as soon as one takes it. error: how the request ends if none does."""
        choice.waiting = asyncio.create_task(self._place(choice, error), name=f"placing {self._request_id}")

    async def _place(self, choice: _Choice, error: LoRAFleetError) -> None:
        deadline = time.monotonic() + self._worker_wait_s
        while True:
            try:
                session = choice.choose()
                choice.submit(session)
                break
            except WorkerUnavailableError:
                if time.monotonic() >= deadline:
                    self._inbox.fail(error)
                    return
            except LoRAFleetError as refused:
                self._inbox.fail(refused)
                return
            await asyncio.sleep(_RETRY_S)
        if choice.num_lost:
            self._metrics.resumed()
            logger.info(
                "request %s: worker %s goes on behind %d tokens",
                self._request_id,
                session.endpoint.worker_id,
                len(choice.queue.received),
            )
