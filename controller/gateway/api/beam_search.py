"""`use_beam_search`: the best answers by beam search, a token of each beam a round.

Owns: the fields that fit it, a round as one-token requests, the answers. Leaves to others: the rules
(workers/scheduling/beam_search.py), sending requests to workers (streams/generation.py).

A beam's request resumes after its tokens, so a worker that has computed them before finds them in its prefix cache.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Final

from lorafleet.controller.gateway.api.door import Call
from lorafleet.controller.gateway.api.schema import GenerateFields, ResponseFormat
from lorafleet.controller.gateway.api.served_model import ServedModel
from lorafleet.controller.gateway.api.usage import usage
from lorafleet.controller.gateway.streams.generation import ChoiceDelta
from lorafleet.workers.errors import DeadlineError, InvalidRequestError, LoRAFleetError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.beam_search import Beam, BeamSearch, BeamSearchParams
from lorafleet.workers.scheduling.logprobs import PromptLogprobs, TokenLogprobs
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.text.output import OutputText
from lorafleet.workers.text.tokenizer import Tokenizer

_ONLY_HERE: Final = {"length_penalty": 1.0, "early_stopping": False}  # with the values that ask for nothing
_NOT_HERE: Final[dict[str, tuple[object, ...]]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "frequency_penalty": (0,),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "logit_bias": ({},),
    "logprob_token_ids": ([],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": (ResponseFormat(type="text"),),
    "stop": ("", []),
    "stream": (False,),
    "structured_outputs": (),
    "tools": ([],),
}
"""Fields that would change which tokens come or when they are sent: the values, besides null, that do not."""


def check_beam_search(fields: GenerateFields) -> None:
    """Raises InvalidRequestError for a field that beam search does not honour, or that only it would."""
    if not fields.use_beam_search:
        for name, usual in _ONLY_HERE.items():
            if (value := getattr(fields, name)) is not None and value != usual:
                raise InvalidRequestError(f"{name} needs use_beam_search to be true.", param=name)
        return
    for name, harmless in _NOT_HERE.items():
        value = getattr(fields, name, None)
        if value is not None and value not in harmless:
            raise InvalidRequestError(f"{name} is not supported with use_beam_search. Leave it out.", param=name)


async def beam_answers(
    call: Call[GenerateFields],
    model: ServedModel,
    requests: Sequence[GenerateRequest],
    params: SamplingParams,
    beam_width: int,
) -> tuple[list[ChoiceDelta], dict[str, Any]]:
    """Return the `params.n` best answers to each prompt, best first, and the usage. Raises the request's errors."""
    fields, tokenizer = call.fields, model.text.tokenizer
    end_ids = params.stop_ids | (frozenset() if params.ignore_eos else tokenizer.eos_token_ids)
    searches = [_search(fields, params, beam_width, request.sampling.max_tokens, end_ids) for request in requests]
    limit_s, metrics = call.state.config.limits.request_timeout_s, call.state.metrics.model(model.entry.name)
    started_at = time.monotonic()
    try:
        async with asyncio.timeout(limit_s):
            prompts, num_cached = await _run(call, model, requests, searches)
    except TimeoutError:
        metrics.ended("error")
        raise DeadlineError(f"The request did not end within {limit_s:g} s, the limit.") from None
    except LoRAFleetError:
        metrics.ended("error")
        raise
    except asyncio.CancelledError:  # the client has disconnected
        metrics.ended("abort")
        raise
    deltas: list[ChoiceDelta] = []
    for request, search, prompt_logprobs in zip(requests, searches, prompts, strict=True):
        for beam in search.best(params.n):
            delta = _answer(beam, len(deltas), request.prompt_token_ids, params, tokenizer)
            deltas.append(dataclasses.replace(delta, prompt_logprobs=prompt_logprobs))
    for delta in deltas:
        metrics.ended(delta.finish_reason or "length")
        metrics.tokens(len(delta.token_ids))
    num_prompt = sum(len(request.prompt_token_ids) for request in requests)
    metrics.finished(time.monotonic() - started_at, num_prompt, num_cached)
    return deltas, usage(num_prompt, sum(len(delta.token_ids) for delta in deltas), num_cached)


def _search(
    fields: GenerateFields, params: SamplingParams, beam_width: int, max_tokens: int, end_ids: frozenset[int]
) -> BeamSearch:
    own: dict[str, Any] = {name: value for name in _ONLY_HERE if (value := getattr(fields, name)) is not None}
    own |= {"min_tokens": params.min_tokens, "ignore_eos": params.ignore_eos}
    try:
        return BeamSearch(BeamSearchParams(beam_width=beam_width, max_tokens=max_tokens, **own), end_ids)
    except InvalidRequestError as error:
        if error.param == "beam_width":  # no field of the request
            error.param = "n" if fields.best_of is None else "best_of"
        raise


async def _run(
    call: Call[GenerateFields],
    model: ServedModel,
    requests: Sequence[GenerateRequest],
    searches: Sequence[BeamSearch],
) -> tuple[list[PromptLogprobs | None], int]:
    """Run the searches. Return the prompts' log-probabilities, and how many of their tokens were cached."""
    prompts: list[PromptLogprobs | None] = [None] * len(requests)
    num_cached = 0
    is_first = True
    while any(search.beams for search in searches):
        steps = [
            _step(request, search, beam)
            for request, search in zip(requests, searches, strict=True)
            for beam in search.beams
        ]
        wanted = requests[0].sampling.prompt_logprobs if is_first else None
        step_params = SamplingParams(max_tokens=1, prompt_logprobs=wanted)
        async with call.state.generate(steps, step_params, model, is_round=True) as generation:
            deltas = await generation.gather()
        if is_first:
            prompts, num_cached, is_first = (
                [delta.prompt_logprobs for delta in deltas],
                generation.num_cached_tokens,
                False,
            )
        entries = iter(delta.logprobs[0] for delta in deltas)
        for search in searches:
            if search.beams:
                search.extend([next(entries) for _ in search.beams])
    return prompts, num_cached


def _step(request: GenerateRequest, search: BeamSearch, beam: Beam) -> GenerateRequest:
    """Return the request for one beam's next tokens. Their log-probabilities matter, not the one that is sampled."""
    sampling = SamplingOptions(
        max_tokens=len(beam.token_ids) + 1,
        temperature=0.0,
        ignore_eos=True,
        logprobs=search.num_candidates,
        prompt_logprobs=None if beam.token_ids else request.sampling.prompt_logprobs,
    )
    return dataclasses.replace(request, sampling=sampling, output_token_ids=beam.token_ids)


def _answer(
    beam: Beam, index: int, prompt_ids: Sequence[int], params: SamplingParams, tokenizer: Tokenizer
) -> ChoiceDelta:
    text = OutputText(tokenizer, prompt_ids[-16:], skip_special_tokens=params.skip_special_tokens)
    hides_last = beam.ended and not params.include_stop_str_in_output
    last = beam.token_ids[-1]
    num_top = params.logprobs or 0
    return ChoiceDelta(
        index=index,
        text=text.push(beam.token_ids, True, hide_last=hides_last).text,
        token_ids=beam.token_ids,
        logprobs=[
            TokenLogprobs(entry.logprob, entry.rank, entry.top_ids[:num_top], entry.top_logprobs[:num_top])
            for entry in beam.logprobs
        ],
        finish_reason="stop" if beam.ended else "length",
        stop_reason=last if beam.ended and last in params.stop_ids else None,
    )
