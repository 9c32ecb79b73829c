"""Requests between their callers and the engine: text, `n` choices, stop strings.

Shared by the stepped `LLMEngine` and the asyncio `AsyncLLM`. Not thread-safe: one owner calls it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lorafleet.workers.errors import InvalidRequestError, LoRAFleetError, quoted
from lorafleet.workers.grammars.check import GrammarChecker
from lorafleet.workers.offline.outputs import CompletionOutput, Logprob, RequestOutput
from lorafleet.workers.params import LoRARequest, SamplingParams
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest, RequestEvent, TokenLogprobs
from lorafleet.workers.text.bad_words import forbidden_sequences
from lorafleet.workers.text.output import OutputText
from lorafleet.workers.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(slots=True)
class _Choice:
    owner: _TextRequest
    output: CompletionOutput
    text: OutputText


@dataclass(slots=True, kw_only=True)
class _TextRequest:
    request_id: str
    number: int  # unlike the caller's id never reused; identifies the request to the engine
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    lora_request: LoRARequest | None
    tokenizer: Tokenizer
    choices: list[_Choice] = field(default_factory=list)
    error: LoRAFleetError | None = None

    @property
    def engine_ids(self) -> list[str]:
        return [f"{self.number}/{index}" for index in range(self.params.n)]

    @property
    def finished(self) -> bool:
        return all(choice.output.finish_reason is not None for choice in self.choices)

    def to_output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[choice.output for choice in self.choices],
            finished=self.finished,
            lora_request=self.lora_request,
            error=self.error,
        )


class TextRequests:
    """Open requests by id; turns them into `GenerateRequest`s and events back into `RequestOutput`s."""

    def __init__(self, *, max_model_len: int, vocab_size_of: Callable[[str | None], int], seed: int | None) -> None:
        """`vocab_size_of`: an adapter's vocabulary size by digest; the base model's for None."""
        self._max_model_len = max_model_len
        self._vocab_size_of = vocab_size_of
        self._random = random.Random(seed)
        self._requests: dict[str, _TextRequest] = {}
        self._choices: dict[str, _Choice] = {}  # by the engine's request id
        self._to_cancel: list[str] = []
        self._numbers = itertools.count()
        self._grammars = GrammarChecker()

    def __len__(self) -> int:
        return len(self._requests)

    def checked(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters with the grammar of their structured_outputs. Slow for a new one; thread-safe.

        Raises `InvalidRequestError` for one that cannot be enforced.
        """
        if params.structured_outputs is None:
            return params
        grammar = self._grammars.checked(params.structured_outputs.grammar_text())
        return replace(params, grammar=grammar)

    def open(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        lora: LoRARequest | None,
        digest: str | None,
        tokenizer: Tokenizer,
        text_digest: str = "",
    ) -> list[GenerateRequest]:
        """Start a request; return one `GenerateRequest` per choice to submit. Raises `InvalidRequestError` and others.

        params: after `checked`. digest and tokenizer: the adapter's, or None and the base model's. text_digest: of a
        tokenizer of the adapter's own.
        """
        if request_id in self._requests:
            raise InvalidRequestError(f"Request id {quoted(request_id)} is in use.", param="request_id")
        ids = tokenizer.encode(prompt, max_tokens=self._max_model_len) if isinstance(prompt, str) else list(prompt)
        if any(type(token_id) is not int for token_id in ids):
            raise InvalidRequestError("A prompt of token ids must be a list of integers.", param="prompt")
        if not ids:
            raise InvalidRequestError("The prompt is empty; give at least one token.", param="prompt")
        vocab_size = self._vocab_size_of(digest)
        tokenizer.check_ids(ids, vocab_size, "prompt")
        seed = self._random.getrandbits(64)
        request = _TextRequest(
            request_id=request_id,
            number=next(self._numbers),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=ids,
            params=params,
            lora_request=lora,
            tokenizer=tokenizer,
        )
        bad_words = forbidden_sequences(tokenizer, params.words)
        generates, shared_ids = [], tuple(ids)
        for index, engine_id in enumerate(request.engine_ids):
            options = params.options(
                num_prompt_tokens=len(ids),
                max_model_len=self._max_model_len,
                vocab_size=vocab_size,
                seed=seed,
                choice=index,
                eos_token_ids=tokenizer.eos_token_ids,
                bad_words=bad_words,
            )
            generates.append(GenerateRequest(engine_id, shared_ids, options, digest, text_digest=text_digest))
        for generate in generates:
            wants_logprobs = params.logprobs is not None
            output = CompletionOutput(
                index=generate.sampling.choice,
                text="",
                token_ids=[],
                cumulative_logprob=0.0 if wants_logprobs else None,
                logprobs=[] if wants_logprobs else None,
            )
            output_text = OutputText(
                tokenizer,
                ids,
                stop=params.stops,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
            )
            choice = _Choice(request, output, output_text)
            request.choices.append(choice)
            self._choices[generate.request_id] = choice
        self._requests[request_id] = request
        return generates

    def drop(self, request_id: str) -> None:
        """Drop a request that the engine did not accept."""
        for engine_id in self.engine_ids(request_id):
            self._choices.pop(engine_id, None)
        self._requests.pop(request_id, None)

    def clear(self) -> None:
        """Drop all requests after the engine has stopped."""
        self._requests.clear()
        self._choices.clear()
        self._to_cancel.clear()

    def close(self) -> None:
        """End the processes that check grammars; nothing is opened any more."""
        self.clear()
        self._grammars.close()

    def engine_ids(self, request_id: str) -> list[str]:
        """Return the engine's ids of a request's choices; empty if it is not open."""
        request = self._requests.get(request_id)
        return [] if request is None else request.engine_ids

    def apply(self, events: Sequence[RequestEvent]) -> list[RequestOutput]:
        """Apply an engine step's events; return each request they changed, once. Finished ones are closed."""
        touched: dict[str, _TextRequest] = {}
        for event in events:
            choice = self._choices.get(event.request_id)
            if choice is None:
                continue  # a choice ended by a stop string; the engine's CANCELLED comes later
            touched[choice.owner.request_id] = choice.owner
            self._book(choice, event)
        for request in touched.values():
            if request.finished:
                del self._requests[request.request_id]
        return [request.to_output() for request in touched.values()]

    def take_cancels(self) -> list[str]:
        """Return, once, the engine ids to cancel because a stop string ended them."""
        cancels, self._to_cancel = self._to_cancel, []
        return cancels

    def _book(self, choice: _Choice, event: RequestEvent) -> None:
        output, params = choice.output, choice.owner.params
        used = 0
        if event.token_id is not None:
            is_stop = event.finish is FinishReason.STOP
            delta = choice.text.push((event.token_id,), event.finish is not None, hide_last=is_stop)
            used = delta.num_tokens_used
            output.text += delta.text
            if used:
                output.token_ids.append(event.token_id)
                if event.logprobs is not None and output.logprobs is not None:
                    decode = choice.owner.tokenizer.decode_token
                    output.logprobs.append(_logprobs(event.token_id, event.logprobs, decode))
                    output.cumulative_logprob = (output.cumulative_logprob or 0.0) + event.logprobs.logprob
            if delta.stop_reason is not None:
                output.finish_reason, output.stop_reason = "stop", delta.stop_reason
                if event.finish is None:
                    self._to_cancel.append(event.request_id)
            elif is_stop:
                output.finish_reason = "stop"
                output.stop_reason = event.token_id if event.token_id in params.stop_ids else None
            elif event.finish is FinishReason.COMPLETE:
                output.finish_reason = "stop"
            elif event.finish is FinishReason.LENGTH:
                output.finish_reason = "length"
        elif event.finish is not None:
            output.text += choice.text.push((), True).text
            output.finish_reason = "abort" if event.error is None else "error"
            choice.owner.error = event.error
        if output.finish_reason is not None:
            del self._choices[event.request_id]


def _logprobs(token_id: int, logprobs: TokenLogprobs, decode: Callable[[int], str]) -> dict[int, Logprob]:
    row = {token_id: Logprob(logprobs.logprob, logprobs.rank, decode(token_id))}
    for rank, (top_id, value) in enumerate(zip(logprobs.top_ids, logprobs.top_logprobs, strict=True), start=1):
        row.setdefault(top_id, Logprob(value, rank, decode(top_id)))
    return row
