"""A request and its end as messages between gateway and worker, both ways.

Owns: the mapping of `GenerateRequest` to worker.proto. Leaves to others: streams and their numbers (the gateway's
session.py, server/service.py), a step's columns (server/service.py, the gateway's delivery.py).

A single-valued field with the same name in both is copied; it is not named here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from google.protobuf.message import Message

from lorafleet.proto import worker_pb2
from lorafleet.workers.errors import LoRAFleetError, WorkerLostError, error_from_code, status_of
from lorafleet.workers.scheduling.ranges import allowed_of
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

SMALLEST: Final = 2.0**-126  # of the wire's floats; anything smaller would arrive as 0
FINISH_TO_WIRE: Final = {
    None: worker_pb2.FINISH_NONE,
    FinishReason.STOP: worker_pb2.FINISH_STOP,
    FinishReason.LENGTH: worker_pb2.FINISH_LENGTH,
    FinishReason.COMPLETE: worker_pb2.FINISH_COMPLETE,
}
FINISH_FROM_WIRE: Final = {wire: finish for finish, wire in FINISH_TO_WIRE.items() if finish is not None}


class _Fields:
    """The fields that a class and a message have in common."""

    def __init__(self, kind: type[Any], message: type[Message]) -> None:
        """Leaves out repeated fields and messages, which have another form in the class."""
        self.all = [field.name for field in dataclasses.fields(kind) if _is_plain(message, field.name)]
        self._optional = [name for name in self.all if message.DESCRIPTOR.fields_by_name[name].has_presence]
        self._always = [name for name in self.all if name not in self._optional]

    def of(self, fields: object) -> dict[str, Any]:
        """Return their values."""
        return {name: getattr(fields, name) for name in self.all}

    def read(self, message: Message) -> dict[str, Any]:
        """Return their values in the message, without those that the sender left out."""
        values = {name: getattr(message, name) for name in self._always}
        values |= {name: getattr(message, name) for name in self._optional if message.HasField(name)}
        return values


def _is_plain(message: type[Message], name: str) -> bool:
    field = message.DESCRIPTOR.fields_by_name.get(name)
    return field is not None and not field.is_repeated and field.message_type is None


_REQUEST: Final = _Fields(GenerateRequest, worker_pb2.Generate)
_SAMPLING: Final = _Fields(SamplingOptions, worker_pb2.Sampling)
_POSITIVE: Final = [
    name for name, allowed in allowed_of(SamplingOptions).items() if allowed.within and allowed.within.is_open
]


def to_wire(request: GenerateRequest, *, stream: int) -> worker_pb2.Generate:
    """Return a request as a message. stream: its number in the session."""
    sampling = request.sampling
    message = worker_pb2.Generate(
        stream=stream,
        adapter_digest=request.adapter,
        composition=[{"digest": digest, "weight": weight} for digest, weight in request.composition],
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        sampling=_SAMPLING.of(sampling)
        | {
            "stop_token_ids": sorted(sampling.stop_token_ids),
            "logit_bias": dict(sampling.logit_bias),
            "allowed_token_ids": sorted(sampling.allowed_token_ids),
            "bad_words": [{"token_ids": word} for word in sampling.bad_words],
        },
        **_REQUEST.of(request),
    )
    for name in _POSITIVE:
        if getattr(sampling, name) < SMALLEST:
            setattr(message.sampling, name, SMALLEST)
    return message


def from_wire(message: worker_pb2.Generate, *, request_id: str) -> GenerateRequest:
    """Return the request in a message. request_id: the engine's. Raises `InvalidRequestError` for a bad value."""
    sampling = message.sampling
    values = _REQUEST.read(message) | {"request_id": request_id}
    return GenerateRequest(
        adapter=message.adapter_digest or None,
        composition=tuple((part.digest, part.weight) for part in message.composition),
        prompt_token_ids=tuple(message.prompt_token_ids[:]),  # a slice is a list, which is read faster
        output_token_ids=tuple(message.output_token_ids),
        sampling=SamplingOptions(
            **_SAMPLING.read(sampling),
            stop_token_ids=frozenset(sampling.stop_token_ids),
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
            allowed_token_ids=frozenset(sampling.allowed_token_ids),
            bad_words=tuple(tuple(word.token_ids) for word in sampling.bad_words),
        ),
        **values,
    )


def error_to_wire(error: LoRAFleetError, *, stream: int) -> worker_pb2.Ended:
    """Return the end of a failed request as a message."""
    return worker_pb2.Ended(
        stream=stream,
        error_code=status_of(error).code,
        error_message=error.message,
        error_reason=getattr(error, "reason", ""),
    )


def error_from_wire(ended: worker_pb2.Ended) -> LoRAFleetError:
    """Return the error with which a request ended. It was not cancelled."""
    if ended.error_code:
        return error_from_code(ended.error_code, ended.error_message, reason=ended.error_reason)
    return WorkerLostError("The worker gave the request up. Send it again.")
