"""Grammar masks: what they allow, when a grammar is complete, and what fails alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import llguidance
import pytest
import torch
from byte_grammar import VOCABULARY

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.grammars.limits import parser_limits
from lorafleet.workers.model.rules.changes import Changes
from lorafleet.workers.model.rules.grammar_masks import GrammarMasks
from lorafleet.workers.model.rules.rule import History, Row
from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

EOS = 256


@pytest.fixture
def masks() -> Iterator[GrammarMasks]:
    masks = GrammarMasks(num_threads=2)
    yield masks
    masks.close()


def begun(masks: GrammarMasks, grammar: str, output: Sequence[int] = ()) -> Request:
    sampling = SamplingOptions(max_tokens=99, grammar=grammar)
    generate = GenerateRequest("r", (1, 2), sampling, output_token_ids=tuple(output))
    request = Request.from_generate(generate, arrival=0)
    matcher = llguidance.LLMatcher(VOCABULARY, grammar, log_level=0, limits=parser_limits())
    masks.begin(request, matcher, VOCABULARY.vocab_size)
    return request


def step(masks: GrammarMasks, requests: Sequence[Request]) -> tuple[list[set[int]], Changes]:
    """Return the tokens that each request may get, and the step's changes."""
    rows = [Row(number, request) for number, request in enumerate(requests)]
    changes = Changes(VOCABULARY.vocab_size, torch.device("cpu"))
    masks.prepare(rows)
    masks.write(rows, changes)
    allowed: list[set[int]] = [set() for _ in requests]
    for numbers, words_RW in changes._masks:
        for number, words_W in zip(numbers, words_RW.tolist(), strict=True):
            bits = ((word >> bit & 1, 32 * place + bit) for place, word in enumerate(words_W) for bit in range(32))
            allowed[number] = {token_id for bit, token_id in bits if bit}
    return allowed, changes


def test_only_requests_with_a_grammar_are_concerned_and_all_of_their_tokens_must_be_known(masks: GrammarMasks) -> None:
    assert masks.history(SamplingOptions(max_tokens=1)) is None
    assert masks.history(SamplingOptions(max_tokens=1, grammar="start: /a/")) is History.KNOWN


def test_each_row_may_have_what_its_grammar_allows(masks: GrammarMasks) -> None:
    requests = [begun(masks, 'start: "ab" | "cd"'), begun(masks, "start: /x*/")]
    assert step(masks, requests)[0] == [{ord("a"), ord("c")}, {ord("x"), EOS}]
    requests[0].token_ids.append(ord("c"))
    requests[1].token_ids.append(ord("x"))
    assert masks.take([(requests[0], ord("c")), (requests[1], ord("x"))]) == {requests[0]: False, requests[1]: False}
    assert step(masks, requests[:1])[0] == [{ord("d")}]
    assert masks.take([(requests[0], ord("d"))]) == {requests[0]: True}


def test_output_from_elsewhere_is_replayed(masks: GrammarMasks) -> None:
    assert step(masks, [begun(masks, 'start: "abc"', b"ab")])[0] == [{ord("c")}]


def test_a_state_ends_with_its_request(masks: GrammarMasks) -> None:
    requests = [begun(masks, "start: /a/") for _ in range(3)]
    assert len(masks._entries) == 3
    del requests
    assert len(masks._entries) == 0


def test_what_cannot_be_followed_fails_alone(masks: GrammarMasks) -> None:
    bad, good = begun(masks, 'start: "abc"', b"ax"), begun(masks, 'start: "abc"', b"a")
    allowed, changes = step(masks, [bad, good])
    assert allowed[1] == {ord("b")}
    assert list(changes.errors) == [0] and isinstance(changes.errors[0], InvalidRequestError)
    error = masks.take([(good, ord("x"))])[good]
    assert isinstance(error, InvalidRequestError) and "After 2 tokens" in error.message
