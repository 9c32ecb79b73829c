"""Sampling row by row: against plain definitions, independent of neighbours, repeatable."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats

from lorafleet.workers.model.rules.option_rules import option_rules
from lorafleet.workers.model.sampling import Sampled, Sampler, uniforms
from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

VOCAB = 50


def row(prompt: tuple[int, ...] = (3,), output: tuple[int, ...] = (), **options: Any) -> Request:
    sampling = SamplingOptions(max_tokens=100, **options)
    request = Request.from_generate(GenerateRequest("r", prompt, sampling), 0)
    request.token_ids.extend(output)
    return request


def make_sampler(eos: frozenset[int] = frozenset()) -> Sampler:
    return Sampler(option_rules(eos, torch.device("cpu")))


def step(sampler: Sampler, logits_SV: torch.Tensor, requests: list[Request]) -> list[Sampled]:
    assert sampler.prepare(requests, logits_SV.device)
    return sampler.sample(logits_SV, requests).results()


def sample(logits_SV: torch.Tensor, requests: list[Request]) -> list[Sampled]:
    return step(make_sampler(), logits_SV, requests)


def draw(logits: torch.Tensor, request: Request, eos: frozenset[int] = frozenset()) -> Sampled:
    return step(make_sampler(eos), logits[None], [request])[0]


def draws(logits: torch.Tensor, count: int, **options: Any) -> Counter[int]:
    requests = [row(seed=i, **options) for i in range(count)]
    return Counter(sampled.token_id for sampled in sample(logits.repeat(count, 1), requests))


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(VOCAB) * 2


def test_temperature_zero_is_the_best_token(logits: torch.Tensor) -> None:
    assert draw(logits, row(temperature=0.0)).token_id == logits.argmax()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_drawn_tokens_follow_the_distribution(logits: torch.Tensor, temperature: float) -> None:
    count = 20_000
    counts = draws(logits, count, temperature=temperature)
    expected = (logits / temperature).softmax(0).double()
    common = expected * count >= 5
    observed = torch.tensor([counts[i] for i in range(VOCAB)], dtype=torch.float64)
    f_obs = torch.cat([observed[common], observed[~common].sum()[None]])
    f_exp = torch.cat([expected[common], expected[~common].sum()[None]]) * count
    keep = f_exp > 0
    f_exp = f_exp[keep] * (f_obs[keep].sum() / f_exp[keep].sum())
    assert stats.chisquare(f_obs[keep].numpy(), f_exp.numpy()).pvalue > 1e-4


def test_top_k_top_p_and_min_p_keep_what_they_promise(logits: torch.Tensor) -> None:
    order = logits.argsort(descending=True).tolist()
    assert set(draws(logits, 2000, top_k=3, temperature=5.0)) == set(order[:3])
    probabilities = logits.softmax(0)
    kept, mass = set(), 0.0
    for token in order:
        if mass >= 0.7:
            break
        kept.add(token)
        mass += probabilities[token].item()
    assert set(draws(logits, 4000, top_p=0.7)) == kept
    floor = 0.2 * probabilities.max()
    assert set(draws(logits, 4000, min_p=0.2)) == {i for i in range(VOCAB) if probabilities[i] >= floor}
    assert set(draws(logits, 200, top_p=1e-9)) == {order[0]}


def test_a_row_does_not_depend_on_its_neighbours(logits: torch.Tensor) -> None:
    requests = [
        row(temperature=0.0),
        row(seed=1),
        row(seed=2, top_k=5),
        row(seed=3, top_p=0.5, logprobs=4),
        row(seed=4, min_p=0.1, temperature=2.0),
        row(seed=5, repetition_penalty=1.7, prompt=(1, 2, 3)),
        row(seed=6, presence_penalty=1.5, frequency_penalty=0.5, output=(4, 4, 9)),
    ]
    together = sample(logits.repeat(len(requests), 1), requests)
    assert together == [draw(logits, request) for request in requests]


def test_the_random_number_depends_on_seed_choice_and_position_alone() -> None:
    numbers = uniforms([1, 1, 1, 2, 1], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0])
    assert numbers[0] == numbers[4]
    assert len(set(numbers.tolist())) == 4
    many = uniforms([7] * 10_000, [0] * 10_000, range(10_000))
    assert ((many >= 0) & (many < 1)).all()
    assert stats.kstest(many, "uniform").pvalue > 1e-4


def test_penalties_equal_their_definition(logits: torch.Tensor) -> None:
    prompt, output = (1, 2, 2), (5, 5, 7)
    options = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.6}
    expected = logits.clone()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token, count in Counter(output).items():
        expected[token] -= 0.4 + 0.6 * count
    # Greedy sampling after raising each token in turn reveals the penalised logits.
    for token in range(VOCAB):
        lift = torch.zeros(VOCAB)
        lift[token] = expected.max() - expected[token]
        lifted = logits + lift * (1.3 if token in {*prompt, *output} else 1.0)
        request = row(prompt=prompt, output=output, temperature=0.0, **options)
        assert draw(lifted + torch.nn.functional.one_hot(torch.tensor(token), VOCAB) * 3.0, request).token_id == token
    assert draw(logits, row(prompt=prompt, output=output, temperature=0.0, **options)).token_id == expected.argmax()


def test_stop_tokens_cannot_come_before_min_tokens(logits: torch.Tensor) -> None:
    best, second = logits.argsort(descending=True)[:2].tolist()
    eos = frozenset([best])
    assert draw(logits, row(temperature=0.0, min_tokens=1), eos).token_id == second
    assert draw(logits, row(temperature=0.0, min_tokens=1, output=(4,)), eos).token_id == best
    assert draw(logits, row(temperature=0.0, min_tokens=1, ignore_eos=True), eos).token_id == best
    stops = frozenset([second])
    third = int(logits.argsort(descending=True)[2])
    assert draw(logits, row(temperature=0.0, min_tokens=1, stop_token_ids=stops), eos).token_id == third


def test_logprobs_are_those_of_the_raw_distribution(logits: torch.Tensor) -> None:
    request = row(seed=11, temperature=3.0, repetition_penalty=2.0, top_k=10, logprobs=5)
    sampled = draw(logits, request)
    raw = logits.log_softmax(0)
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(raw[sampled.token_id].item())
    assert sampled.logprobs.rank == int((raw > raw[sampled.token_id]).sum()) + 1
    assert list(sampled.logprobs.top_ids) == raw.topk(5).indices.tolist()
    assert list(sampled.logprobs.top_logprobs) == pytest.approx(raw.topk(5).values.tolist())
    none = draw(logits, row(temperature=0.0, logprobs=0)).logprobs
    assert none is not None and none.top_ids == ()


def test_a_row_of_nan_is_reported_and_harms_no_other(logits: torch.Tensor) -> None:
    rows = logits.repeat(3, 1)
    rows[1, 7] = torch.nan
    results = sample(rows, [row(seed=1), row(seed=2), row(seed=3, top_p=0.9)])
    assert [result.is_finite for result in results] == [True, False, True]
    assert results[0] == draw(logits, row(seed=1))
    assert results[2] == draw(logits, row(seed=3, top_p=0.9))


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 100.0])
def test_extreme_temperatures_stay_in_range(logits: torch.Tensor, temperature: float) -> None:
    result = draw(logits, row(seed=1, temperature=temperature))
    assert result.is_finite and 0 <= result.token_id < VOCAB
    if temperature < 1e-3:
        assert result.token_id == logits.argmax()


class WatchedRequest(Request):
    """Counts reads of its options."""

    num_reads = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "sampling":
            self.num_reads += 1
        return super().__getattribute__(name)


def watched(**options: Any) -> WatchedRequest:
    plain = row(**options)
    return WatchedRequest(
        request_id="r",
        sampling=plain.sampling,
        adapter=None,
        token_ids=list(plain.token_ids),
        num_prompt_tokens=plain.num_prompt_tokens,
        arrival=0,
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_options_are_read_when_the_batch_changes_and_not_at_every_step(
    logits: torch.Tensor, temperature: float
) -> None:
    requests = [watched(temperature=temperature, top_p=0.9, seed=i) for i in range(5)]
    sampler = make_sampler()

    def run(batch: list[Request]) -> list[int]:
        """Return the reads of each request's options in a step that gives each a token."""
        before = [request.num_reads for request in requests]
        for request, sampled in zip(batch, step(sampler, logits.repeat(len(batch), 1), batch), strict=True):
            request.token_ids.append(sampled.token_id)
        return [request.num_reads - n for request, n in zip(requests, before, strict=True)]

    assert min(run([*requests])) > 0
    for _ in range(3):
        assert run([*requests]) == [0] * 5
    smaller = run([*requests[:3]])
    assert min(smaller[:3]) > 0 and smaller[3:] == [0, 0]
    assert run([*requests[:3]]) == [0] * 5
    assert min(run([requests[1], requests[0], requests[2]])[:3]) > 0, "another order is another batch"


def test_a_sampler_gives_what_a_new_one_gives_whatever_it_did_before(logits: torch.Tensor) -> None:
    def make() -> list[Request]:
        return [
            row(temperature=0.0),
            row(seed=1),
            row(seed=2, temperature=0.0, min_tokens=2),
            row(seed=3, top_k=5, min_tokens=3),
            row(seed=4, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=3),
            row(seed=5, min_p=0.2, logprobs=0),
        ]

    requests, eos = make(), frozenset([int(logits.argmax())])
    sampler = make_sampler(eos)
    batches = [
        requests,
        requests,
        requests,
        requests[::-1],
        requests[1:4],
        requests[1:4],
        [*requests[2:4], row(seed=9)],
    ]
    reused: list[Request] = []
    for number, batch in enumerate(batches):
        rows = logits.repeat(len(batch), 1) + torch.randn(len(batch), VOCAB) * 0.3
        reused[:] = batch
        sampled = step(sampler, rows, reused)
        assert sampled == step(make_sampler(eos), rows, batch), number
        for request, own in zip(batch, sampled, strict=True):
            request.token_ids.append(own.token_id)
    assert requests[2].token_ids[1] not in eos and requests[2].token_ids[2] not in eos


def test_an_unchanged_batch_draws_new_numbers_at_every_position(logits: torch.Tensor) -> None:
    request, sampler, count = row(seed=3), make_sampler(), 200
    for position in range(count):
        token_id = step(sampler, logits[None], [request])[0].token_id
        end = logits.double().softmax(0).cumsum(0)
        assert token_id == int((end <= uniforms([3], [0], [position])[0]).sum())
        request.token_ids.append(token_id)
    assert len(set(request.token_ids[1:])) > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_16_bits_are_sampled_as_they_are(logits: torch.Tensor, dtype: torch.dtype) -> None:
    requests = [
        row(temperature=0.0),
        row(seed=1, top_p=0.9),
        row(seed=2, repetition_penalty=1.03, temperature=0.0, prompt=(1, 2, 3)),
        row(seed=3, presence_penalty=0.011, output=(1, 2, 3), logprobs=20),
        row(seed=4, logprobs=5, min_tokens=3),
    ]
    rows = (logits + torch.randn(len(requests), VOCAB)).to(dtype)
    before = rows.clone()
    eos = frozenset([int(rows[4].argmax())])
    ours, wanted = (step(make_sampler(eos), logits, requests) for logits in (rows, rows.float()))
    assert ours == wanted
    assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_penalties_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps  # between 2 and the number below it
    logits = torch.tensor([0.0, 2.0 - step, 2.0], dtype=dtype)
    assert draw(logits, row(temperature=0.0, repetition_penalty=1.0 + 0.35 * step, prompt=(2,))).token_id == 2
    assert draw(logits, row(temperature=0.0, repetition_penalty=1.0 + 0.65 * step, prompt=(2,))).token_id == 1


def test_penalties_do_not_hide_nan_and_do_not_look_like_it(logits: torch.Tensor) -> None:
    rows = logits.repeat(3, 1)
    rows[0, 7] = torch.nan
    rows[1, 0] = 3.0
    requests = [
        row(seed=1, repetition_penalty=1.2),
        row(temperature=0.0, repetition_penalty=1e-39, prompt=(0,)),
        row(seed=2, repetition_penalty=1e-39, prompt=(int(logits.argmax()),)),
    ]
    results = sample(rows, requests)
    assert [result.is_finite for result in results] == [False, True, True]
    assert results[1].token_id == 0
    assert results[2].token_id == logits.argmax()
