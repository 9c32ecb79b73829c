"""The reduction of prompt logits."""

from __future__ import annotations

import math

import torch

from lorafleet.workers.model.prompt_scores import PromptScores
from lorafleet.workers.scheduling.batch import Scheduled
from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

CPU = torch.device("cpu")


def scheduled(token_ids: tuple[int, ...], num_top: int | None) -> Scheduled:
    options = SamplingOptions(max_tokens=1, prompt_logprobs=num_top)
    return Scheduled(Request.from_generate(GenerateRequest("r", token_ids, options), 1), len(token_ids), ())


def test_each_request_gets_its_own_rows_and_number_of_candidates_however_the_rows_come() -> None:
    entries = [scheduled((1, 2, 3), 1), scheduled((4, 5), None), scheduled((6, 7, 0, 1), 3), scheduled((5,), 2)]
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    scores = PromptScores(entries, CPU)
    for piece in logits.split([1, 3, 1]):
        scores.add(piece)
    pending = scores.pending()
    assert pending is not None
    results = pending.results()
    assert list(results) == [entries[0].request, entries[2].request]
    raw = logits.float().log_softmax(dim=1)
    rows = iter(zip(raw, (2, 3, 7, 0, 1), strict=True))
    for request, num_top in ((entries[0].request, 1), (entries[2].request, 3)):
        own = results[request]
        assert own is not None and len(own) == request.num_prompt_tokens - 1
        for entry, (row, next_id) in zip(own, rows, strict=False):
            assert math.isclose(entry.logprob, row[next_id].item(), rel_tol=1e-6)
            assert entry.rank == 1 + int((row > row[next_id]).sum())
            assert entry.top_ids == tuple(row.topk(num_top).indices.tolist())


def test_a_token_for_which_the_model_has_no_logit_is_impossible() -> None:
    scores = PromptScores([scheduled((1, 12, 3), 1)], CPU)
    scores.add(torch.zeros(2, 10))
    pending = scores.pending()
    assert pending is not None
    ((own,),) = [pending.results().values()]
    assert own is not None
    first, second = own
    assert first.logprob == -math.inf and first.rank == 11
    assert math.isclose(second.logprob, -math.log(10), rel_tol=1e-6)


def test_logits_that_are_not_finite_are_told_apart() -> None:
    entries = [scheduled((1, 2), 0), scheduled((1, 2), 0)]
    scores = PromptScores(entries, CPU)
    scores.add(torch.tensor([[0.0, 1.0, math.inf], [0.0, 1.0, -math.inf]]))
    pending = scores.pending()
    assert pending is not None
    first, second = pending.results().values()
    assert first is None and second is not None


def test_a_step_without_such_requests_has_no_results() -> None:
    assert PromptScores([scheduled((1, 2), None)], CPU).pending() is None
