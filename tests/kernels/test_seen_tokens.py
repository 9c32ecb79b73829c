"""Lists of the tokens seen, counted from the history and token by token."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from lorafleet.kernels.seen_tokens import add_sampled_, seen_tokens, token_codes


def codes(prompt: list[int], output: list[int]) -> dict[int, int]:
    """Return the codes by their definition."""
    counts = Counter(output)
    return {token: 2 * counts[token] + (token in prompt) for token in {*prompt, *output}}


def as_dict(tokens_C2: torch.Tensor) -> dict[int, int]:
    entries = tokens_C2[1 : 1 + int(tokens_C2[0, 0])].tolist()
    assert len({token for token, _ in entries}) == len(entries), "one entry a token"
    return dict(entries)


@pytest.mark.parametrize(
    ("prompt", "output"), [([3], []), ([3, 3, 0], [3, 7, 7, 9]), ([], [5, 5]), (list(range(300)), [299])]
)
def test_codes_tell_prompt_and_count(prompt: list[int], output: list[int]) -> None:
    token_ids, own = token_codes([*prompt, *output], len(prompt))
    assert dict(zip(token_ids.tolist(), own.tolist(), strict=True)) == codes(prompt, output)
    assert as_dict(seen_tokens([*prompt, *output], len(prompt), 5)) == codes(prompt, output)


@pytest.mark.usefixtures("each_version")
def test_lists_kept_token_by_token_are_those_counted_at_once() -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(50) for _ in range(rng.randrange(1, 60))] for _ in range(7)]
    outputs: list[list[int]] = [[] for _ in prompts]
    lists = [seen_tokens(prompt, len(prompt), 80) for prompt in prompts]
    for _ in range(80):
        token_ids = torch.tensor([rng.randrange(90) for _ in range(10)])
        rows = torch.tensor(rng.sample(range(10), len(lists)))
        add_sampled_(lists, rows, token_ids)
        for output, token_id in zip(outputs, token_ids[rows].tolist(), strict=True):
            output.append(token_id)
    for prompt, output, own in zip(prompts, outputs, lists, strict=True):
        assert as_dict(own) == codes(prompt, output)
