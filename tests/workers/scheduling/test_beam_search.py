"""Beam search over a table of next tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.scheduling.beam_search import MAX_BEAM_WIDTH, BeamSearch, BeamSearchParams
from lorafleet.workers.scheduling.logprobs import TokenLogprobs

END = 0
# Probabilities of the tokens 0 (the end), 1 and 2 after each sequence.
TABLE: dict[tuple[int, ...], tuple[float, ...]] = {
    (): (0.05, 0.6, 0.35),
    (1,): (0.3, 0.35, 0.35),
    (2,): (0.8, 0.1, 0.1),
    (1, 1): (0.5, 0.3, 0.2),
    (1, 2): (0.9, 0.05, 0.05),
}


def search(max_rounds: int = 9, **options: Any) -> tuple[list[tuple[int, ...]], int]:
    """Return the finished sequences, best first, and the number of rounds."""
    params = BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **options})
    found = BeamSearch(params, frozenset() if params.ignore_eos else frozenset({END}))
    rounds = 0
    while found.beams:
        rounds += 1
        assert rounds <= max_rounds
        found.extend([following(beam.token_ids, found.num_candidates) for beam in found.beams])
    return [beam.token_ids for beam in found.best(params.beam_width)], rounds


def following(token_ids: tuple[int, ...], count: int) -> TokenLogprobs:
    probabilities = TABLE.get(token_ids, (0.9, 0.05, 0.05))
    ids = tuple(sorted(range(3), key=lambda token_id: -probabilities[token_id]))[:count]
    logprobs = tuple(math.log(probabilities[token_id]) for token_id in ids)
    return TokenLogprobs(logprobs[0], 1, ids, logprobs)


def test_the_best_sequence_need_not_begin_with_the_best_token() -> None:
    # (2, 0): 0.28; (1, 0): 0.18; (1, 2, 0): 0.189, whose mean is better than that of both.
    assert search(length_penalty=0.0) == ([(2, 0), (1, 2, 0)], 3)
    assert search(length_penalty=1.0)[0] == [(1, 2, 0), (2, 0)]
    assert search(beam_width=1) == ([(1, 1, 0)], 3), "greedy"


def test_early_stopping_ends_with_the_first_full_set() -> None:
    assert search(early_stopping=True, max_tokens=9)[1] <= search(early_stopping=False, max_tokens=9)[1]
    assert search(early_stopping="never", max_tokens=9)[1] >= search(early_stopping=False, max_tokens=9)[1]


def test_sequences_end_at_the_last_token_and_not_before_the_least() -> None:
    sequences, rounds = search(max_tokens=2, min_tokens=2, ignore_eos=True)
    assert rounds == 2 and all(len(token_ids) == 2 for token_ids in sequences)
    sequences, _ = search(min_tokens=3)
    assert all(len(token_ids) == 3 and END not in token_ids[:-1] for token_ids in sequences)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": MAX_BEAM_WIDTH + 1}, "beam_width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"length_penalty": 1e9}, "length_penalty"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"early_stopping": 1}, "early_stopping"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **options})
    assert caught.value.param == param


def test_end_tokens_take_room_among_the_candidates() -> None:
    params = BeamSearchParams(beam_width=18, max_tokens=4)
    BeamSearch(params, frozenset({1, 2}))
    with pytest.raises(InvalidRequestError, match="at most 17"):
        BeamSearch(params, frozenset({1, 2, 3}))
