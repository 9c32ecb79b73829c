"""The life of one API request after parsing: its choices on their workers, and their tokens as text.

Owns: turning arrived tokens into deltas, finish reasons, cancelling what is no longer needed. Leaves to others: parsing
and tokenizing (api/completions.py, api/chat.py), framing (api/sse.py), giving choices to workers (placing.py).

A choice whose worker is lost is resumed by another one, where its tokens so far count as its own output; the client
sees no interruption. However a request ends (finished, stop string, error, client gone, shutdown), leaving the ``with``
block cancels what still runs on the workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from lorafleet.controller.gateway.metrics.instruments import ModelMetrics
from lorafleet.controller.gateway.streams.inbox import ChoiceQueue, Inbox
from lorafleet.controller.gateway.streams.placing import Placing, Ticket, Workers
from lorafleet.workers.errors import LoRAFleetError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.logprobs import PromptLogprobs, TokenLogprobs
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.text.output import OutputText
from lorafleet.workers.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta:
    """One choice's new text and tokens. logprobs: none, or one for each token. prompt_logprobs: of the whole prompt, if
    asked for. A finish_reason marks the last delta."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None  # the stop string or the caller's stop token
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(slots=True, eq=False)
class _Choice:
    ticket: Ticket
    text: OutputText | None = None  # set with its first token
    last_at: float | None = None  # arrival of its last tokens
    quiet_ids: list[int] = field(default_factory=list)  # its last tokens, if they brought no text yet


class Generation:
    """One request's choices. Call `start`, then `next` until it returns nothing. Used by one task."""

    def __init__(
        self,
        requests: Sequence[GenerateRequest],
        params: SamplingParams,
        *,
        tokenizer: Tokenizer,
        workers: Workers,
        max_queued_tokens: int,
        worker_wait_s: float,
        metrics: ModelMetrics,
        shown_tokens: frozenset[int] = frozenset(),
    ) -> None:
        """requests: one for each prompt, with `params.n` choices each. worker_wait_s: maximum wait of a choice for a
        worker that takes or resumes it. shown_tokens: ids of special tokens that are part of the text."""
        self.num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self.num_output_tokens = 0
        self._tokenizer = tokenizer
        self._params = params
        self._shown_tokens = shown_tokens
        self._metrics = metrics
        self._started_at = time.monotonic()
        self._has_token = False
        self._inbox = Inbox(max_queued_tokens, self._cancel_all, self._lost)
        self._placing = Placing(
            request_id=requests[0].request_id,
            workers=workers,
            worker_wait_s=worker_wait_s,
            fail=self._inbox.fail,
            on_resumed=metrics.resumed,
        )
        self._choices: list[_Choice] = []
        self._queues_by_prompt: list[list[ChoiceQueue]] = []
        for request in requests:
            self._add(request)
        self._num_open = len(self._choices)
        self._held: list[ChoiceQueue] = []  # with tokens, of prompts whose log-probabilities are still to come

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def has_worker(self) -> bool:
        """Return whether a worker has any of its choices."""
        return self._placing.num_placed > 0

    @property
    def num_cached_tokens(self) -> int:
        """Return the number of prompt tokens that no choice had to compute."""
        return sum(min(queue.num_cached_tokens for queue in queues) for queues in self._queues_by_prompt)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cancel_all()
        if isinstance(error, ConnectionError | asyncio.CancelledError):  # the client has disconnected
            self._metrics.ended("abort")
        elif error is not None or self._num_open:
            self._metrics.ended("error")
        else:
            seconds = time.monotonic() - self._started_at
            self._metrics.finished(seconds, self.num_prompt_tokens, self.num_cached_tokens)

    def fail(self, error: LoRAFleetError) -> None:
        """End the request: `next` raises `error` after what has already arrived."""
        self._inbox.fail(error)

    def start(self) -> None:
        """Submit the choices as workers take them. Raises the error of a choice that no worker will ever take."""
        self._placing.start()

    async def next(self) -> list[ChoiceDelta]:
        """Wait, and return what has arrived since the last call, one delta for each choice; empty at the end.

        Raises the error that ended the request.
        """
        deltas: list[ChoiceDelta] = []
        while self._num_open and not deltas:
            ready, self._held = self._held + await self._inbox.take(), []
            for queue in ready:
                if self._lacks_prompt_logprobs(queue):
                    self._held.append(queue)
                    continue
                delta = self._advance(self._choices[queue.index])
                if delta.text or delta.logprobs or delta.finish_reason is not None:
                    deltas.append(delta)
                else:
                    self._choices[queue.index].quiet_ids.extend(delta.token_ids)
        return deltas

    async def gather(self) -> list[ChoiceDelta]:
        """Return the whole of every choice, once all have ended."""
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
                index=index,
                text="".join(texts[index]),
                token_ids=token_ids[index],
                logprobs=logprobs[index],
                finish_reason=last[index].finish_reason,
                stop_reason=last[index].stop_reason,
                prompt_logprobs=last[index].prompt_logprobs,
            )
            for index in range(len(self._choices))
        ]

    def _add(self, request: GenerateRequest) -> None:
        queues = []
        for number in range(self._params.n):
            queue = self._inbox.open_queue(len(self._choices))
            ticket = Ticket(queue, request, number)
            self._placing.add(ticket)
            self._choices.append(_Choice(ticket))
            queues.append(queue)
        self._queues_by_prompt.append(queues)

    def _first_of_prompt(self, queue: ChoiceQueue) -> ChoiceQueue:
        """Return the queue of the choice that brings the prompt's log-probabilities."""
        return self._queues_by_prompt[queue.index // self._params.n][0]

    def _lacks_prompt_logprobs(self, queue: ChoiceQueue) -> bool:
        if self._params.prompt_logprobs is None:
            return False
        first = self._first_of_prompt(queue)
        return not first.received and first.finish is None

    def _advance(self, choice: _Choice) -> ChoiceDelta:
        ticket = choice.ticket
        token_ids, logprobs, finish = ticket.queue.take()
        ticket.give_up_at = None
        at = time.monotonic()
        if choice.last_at is not None:
            self._metrics.gap(at - choice.last_at)
        elif not self._has_token:
            self._has_token = True
            self._metrics.first_token(at - self._started_at)
        choice.last_at = at
        params = self._params
        if choice.text is None:
            choice.text = self._new_text(ticket.request.prompt_token_ids)
        by_token = finish is FinishReason.STOP
        delta = choice.text.push(
            token_ids, finish is not None, hide_last=by_token and not params.include_stop_str_in_output
        )
        reason: Literal["stop", "length"] | None = None
        stop_reason: str | int | None = delta.stop_reason
        if stop_reason is not None or by_token or finish is FinishReason.COMPLETE:
            reason = "stop"
            if stop_reason is None and by_token and token_ids[-1] in params.stop_ids:
                stop_reason = token_ids[-1]
        elif finish is not None:
            reason = "length"
        num_used = delta.num_tokens_used
        self.num_output_tokens += num_used
        self._metrics.tokens(num_used)
        if reason is not None:
            self._num_open -= 1
            self._metrics.ended(reason)
            self._placing.end(ticket)
        if num_used != len(token_ids):
            token_ids, logprobs = token_ids[:num_used], logprobs[:num_used]
        if choice.quiet_ids:
            token_ids, choice.quiet_ids = choice.quiet_ids + token_ids, []
        return ChoiceDelta(
            index=ticket.queue.index,
            text=delta.text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            prompt_logprobs=self._first_of_prompt(ticket.queue).prompt_logprobs,
        )

    def _new_text(self, prompt_token_ids: Sequence[int]) -> OutputText:
        params = self._params
        return OutputText(
            self._tokenizer,
            prompt_token_ids[-16:],
            stop=params.stops,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
            shown=self._shown_tokens,
        )

    def _cancel_all(self) -> None:
        self._placing.stop()
        for choice in self._choices:
            self._placing.end(choice.ticket)

    def _lost(self, queue: ChoiceQueue, error: LoRAFleetError) -> None:
        self._placing.lose(self._choices[queue.index].ticket, error)
