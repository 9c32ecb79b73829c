"""A request is the same on both ends of the wire."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.proto import worker_pb2
from lorafleet.workers.errors import (
    AdapterRefusedError,
    DrainingError,
    InvalidRequestError,
    LoRAFleetError,
    WorkerLostError,
    status_of,
)
from lorafleet.workers.request_wire import (
    FINISH_FROM_WIRE,
    FINISH_TO_WIRE,
    SMALLEST,
    error_from_wire,
    error_to_wire,
    from_wire,
    to_wire,
)
from lorafleet.workers.scheduling.ranges import Allowed, allowed_of
from lorafleet.workers.scheduling.request import (
    MAX_COMPOSED,
    MAX_COMPOSED_WEIGHT,
    MAX_SALT_CHARS,
    MAX_TENANT_CHARS,
    FinishReason,
    GenerateRequest,
)
from lorafleet.workers.scheduling.sampling_options import MAX_INT, SamplingOptions

TOKEN_IDS = st.lists(st.integers(0, 2**32 - 1), max_size=20)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WEIGHTS = st.floats(-MAX_COMPOSED_WEIGHT, MAX_COMPOSED_WEIGHT)


def values(allowed: Allowed, width: Literal[32, 64]) -> st.SearchStrategy[Any]:
    """All that a field may be, as far as floats of so many bits hold it."""
    within = allowed.within
    strategy: st.SearchStrategy[Any] = st.booleans()
    if within is not None and allowed.kind is int:
        strategy = st.integers(int(within.low), int(within.high))
    elif within is not None:
        low = max(within.low, SMALLEST) if within.is_open else within.low
        strategy = st.floats(low, within.high, width=width, allow_subnormal=False)
    return st.none() | strategy if allowed.may_be_none else strategy


def declared(
    kind: type[SamplingOptions | GenerateRequest], width: Literal[32, 64]
) -> dict[str, st.SearchStrategy[Any]]:
    """The fields of a dataclass that have a range."""
    return {name: values(allowed, width) for name, allowed in allowed_of(kind).items()}  # type: ignore[arg-type]


SAMPLING = st.builds(
    SamplingOptions,
    **declared(SamplingOptions, 32),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 2**32 - 1),
    stop_token_ids=st.frozensets(st.integers(0, 2**32 - 1), max_size=10),
    grammar=TEXT,
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-100, 100, width=32), max_size=10).map(
        lambda bias: tuple(sorted(bias.items()))
    ),
    allowed_token_ids=st.frozensets(st.integers(0, 2**32 - 1), max_size=10),
    bad_words=st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5).map(tuple), max_size=5).map(tuple),
)


@st.composite
def requests(draw: st.DrawFn) -> GenerateRequest:
    sampling = draw(SAMPLING)
    digests = draw(st.lists(TEXT.filter(bool), max_size=MAX_COMPOSED, unique=True))
    composition = [(digest, draw(WEIGHTS)) for digest in digests]
    return GenerateRequest(
        draw(TEXT),
        tuple(draw(TOKEN_IDS)),
        sampling,
        None if composition else draw(st.none() | TEXT.filter(bool)),
        **{name: draw(strategy) for name, strategy in declared(GenerateRequest, 64).items()},
        tenant=draw(TEXT) + "t" * draw(st.sampled_from([0, MAX_TENANT_CHARS - 20])),
        cache_salt=draw(st.none() | TEXT.filter(bool) | st.just("s" * MAX_SALT_CHARS)),
        composition=tuple(composition),
        output_token_ids=tuple(draw(TOKEN_IDS)[: sampling.max_tokens - 1]),
        text_digest=draw(TEXT),
    )


@given(requests(), st.integers(0, 2**32 - 1))
def test_what_is_sent_is_what_arrives(request: GenerateRequest, stream: int) -> None:
    sent = to_wire(request, stream=stream).SerializeToString()
    message = worker_pb2.Generate.FromString(sent)
    assert message.stream == stream
    assert message.request_id == request.request_id
    assert from_wire(message, request_id=request.request_id) == request


def test_every_field_of_a_request_is_tried_and_has_another_value_than_its_default() -> None:
    """The property above would say nothing of a field that it leaves at its default."""
    drawn = {*declared(SamplingOptions, 32), "seed", "choice", "stop_token_ids"}
    drawn |= {"logit_bias", "allowed_token_ids", "bad_words", "grammar"}
    assert {field.name for field in dataclasses.fields(SamplingOptions)} == drawn
    drawn = {*declared(GenerateRequest, 64), "request_id", "prompt_token_ids", "sampling", "adapter", "tenant"}
    drawn |= {"cache_salt", "composition", "output_token_ids", "text_digest"}
    assert {field.name for field in dataclasses.fields(GenerateRequest)} - {"adapter_start"} == drawn


def test_the_wire_has_the_fields_of_the_classes_and_no_others() -> None:
    names = {field.name for field in worker_pb2.Sampling.DESCRIPTOR.fields}
    assert names == {field.name for field in dataclasses.fields(SamplingOptions)}
    names = {field.name for field in worker_pb2.Generate.DESCRIPTOR.fields} - {"stream", "adapter_digest"}
    assert names == {field.name for field in dataclasses.fields(GenerateRequest)} - {"adapter", "adapter_start"}


@given(st.floats(0.0, 1.0, exclude_min=True), st.floats(0.0, 100.0, exclude_min=True))
def test_what_must_not_be_zero_is_not_rounded_to_it(top_p: float, penalty: float) -> None:
    options = SamplingOptions(max_tokens=1, top_p=top_p, repetition_penalty=penalty)
    sampling = from_wire(to_wire(GenerateRequest("r", (1,), options), stream=1), request_id="r").sampling
    assert sampling.top_p == pytest.approx(top_p, rel=1e-6, abs=SMALLEST)
    assert sampling.repetition_penalty == pytest.approx(penalty, rel=1e-6, abs=SMALLEST)
    assert min(sampling.top_p, sampling.repetition_penalty) > 0.0


def test_what_a_sender_leaves_out_is_the_default() -> None:
    sampling = worker_pb2.Sampling(max_tokens=1, top_p=1.0, repetition_penalty=1.0)
    request = from_wire(worker_pb2.Generate(prompt_token_ids=[1], sampling=sampling), request_id="r")
    assert request == GenerateRequest("r", (1,), SamplingOptions(max_tokens=1, temperature=0.0))


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"sampling": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling": {"temperature": math.nan}}, "temperature"),
        ({"sampling": {"top_p": 0.0}}, "top_p"),
        ({"sampling": {"logprobs": 21}}, "logprobs"),
        ({"sampling": {"max_tokens": MAX_INT + 1}}, "max_tokens"),
        ({"sampling": {"logit_bias": {5: math.nan}}}, "logit_bias"),
        ({"sampling": {"logit_bias": {5: 101.0}}}, "logit_bias"),
        ({"sampling": {"logit_bias": dict.fromkeys(range(1025), 1.0)}}, "logit_bias"),
        ({"sampling": {"allowed_token_ids": range(16385)}}, "allowed_token_ids"),
        ({"sampling": {"bad_words": [{"token_ids": []}]}}, "bad_words"),
        ({"sampling": {"bad_words": [{"token_ids": [1] * 5000}]}}, "bad_words"),
        ({"sampling": {"bad_words": [{"token_ids": [1]}] * 513}}, "bad_words"),
        ({"tenant_weight": 0.0}, "tenant_weight"),
        ({"adapter_weight": math.inf}, "adapter_weight"),
        ({"priority": -(2**31)}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "s" * 1025}, "cache_salt"),
        ({"output_token_ids": [1, 2, 3, 4]}, "output_token_ids"),
        ({"composition": [{"digest": "d", "weight": math.nan}]}, "adapters"),
    ],
)
def test_what_arrives_is_checked_again(message: dict[str, Any], param: str) -> None:
    sampling = {"max_tokens": 4, "top_p": 1.0, "repetition_penalty": 1.0} | message.get("sampling", {})
    with pytest.raises(InvalidRequestError) as caught:
        from_wire(worker_pb2.Generate(**{**message, "sampling": sampling}), request_id="r")
    assert caught.value.param == param


@pytest.mark.parametrize(
    "error", [InvalidRequestError("bad"), DrainingError("later"), AdapterRefusedError("no", reason="too_large")]
)
def test_an_error_arrives_as_what_it_was(error: LoRAFleetError) -> None:
    message = error_to_wire(error, stream=3)
    assert message.stream == 3
    arrived = error_from_wire(message)
    assert status_of(arrived) == status_of(error)
    assert arrived.message == error.message
    assert getattr(arrived, "reason", None) == getattr(error, "reason", None)


def test_an_end_without_an_error_is_a_lost_worker() -> None:
    assert isinstance(error_from_wire(worker_pb2.Ended(stream=1)), WorkerLostError)


@pytest.mark.parametrize("finish", [FinishReason.STOP, FinishReason.LENGTH])
def test_a_finish_is_the_same_both_ways(finish: FinishReason) -> None:
    assert FINISH_FROM_WIRE[FINISH_TO_WIRE[finish]] is finish


def test_no_finish_is_zero_on_the_wire() -> None:
    assert FINISH_TO_WIRE[None] == 0
