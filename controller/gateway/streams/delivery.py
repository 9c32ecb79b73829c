"""Delivers one engine step's columns to the queues of their choices. The hottest loop of the gateway.

Owns: reading the columns. Leaves to others: the stream they came on (session.py), their use (generation.py).
"""

from __future__ import annotations

from lorafleet.controller.gateway.streams.inbox import ChoiceQueue
from lorafleet.proto import worker_pb2
from lorafleet.workers.errors import DrainingError
from lorafleet.workers.request_wire import FINISH_FROM_WIRE, error_from_wire, prompt_logprobs_from_wire
from lorafleet.workers.scheduling.logprobs import TokenLogprobs
from lorafleet.workers.scheduling.request import FinishReason


class SessionLost(Exception):
    """The session has failed; the text says why, and clients may see it."""


def deliver(step: worker_pb2.StepOutputs, streams: dict[int, ChoiceQueue]) -> None:
    """Put each row into its queue; remove streams that have ended from `streams`.

    Rows of unknown streams (cancelled meanwhile) are dropped. Raises SessionLost for columns that do not belong
    together, after which nothing on the session could be trusted.
    """
    if not len(step.stream) == len(step.token_id) == len(step.finish):
        raise SessionLost("a step with columns of different lengths")
    for cached in step.cached:
        queue = streams.get(cached.stream)
        if queue is not None:
            queue.num_cached_tokens = cached.num_tokens
    for part in step.prompt_logprobs:
        queue = streams.get(part.stream)
        if queue is not None:
            queue.add_prompt_logprobs(prompt_logprobs_from_wire(part))
    logprobs = {entry.row: _token_logprobs(entry) for entry in step.logprobs} if step.logprobs else {}
    rows = zip(step.stream, step.token_id, step.finish, strict=True)
    for row, (stream, token_id, finish) in enumerate(rows):
        queue = streams.get(stream)
        if queue is None:
            continue
        if finish:
            del streams[stream]
        queue.put(
            token_id,
            FINISH_FROM_WIRE.get(finish, FinishReason.LENGTH) if finish else None,
            logprobs.get(row) if logprobs else None,
        )
    for ended in step.ended:
        queue = streams.pop(ended.stream, None)
        if queue is None:
            continue
        if ended.finish:
            queue.end(FINISH_FROM_WIRE.get(ended.finish, FinishReason.LENGTH))
        else:
            error = error_from_wire(ended)
            # A draining worker refuses requests sent before its gateways knew; another worker takes them.
            (queue.lose if isinstance(error, DrainingError) else queue.inbox.fail)(error)


def _token_logprobs(entry: worker_pb2.Logprobs) -> TokenLogprobs:
    return TokenLogprobs(entry.logprob, entry.rank, tuple(entry.top_ids), tuple(entry.top_logprobs))
