"""Sharing a request's pages: others find them once their content is computed, or is computed in the same step."""

from __future__ import annotations

import pytest
from scheduling import PAGE, World

from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions


def num_found(world: World, *token_ids: int) -> int:
    """Return how many tokens of a prompt another request would find now."""
    probe = Request.from_generate(GenerateRequest("probe", token_ids, SamplingOptions(max_tokens=1)), 0)
    return world.scheduler._pages.num_found_tokens(probe)


def test_of_a_prompt_in_chunks_others_find_what_is_computed_and_no_more() -> None:
    world = World(budget=10, prefix_caching=True)
    world.add("long", 23)
    prompt = (7,) * 40
    assert num_found(world, *prompt) == 0, "it has not begun"
    for num_scheduled, in_pages in ((10, 8), (20, 20), (23, 20)):
        plan = world.scheduler.schedule()
        assert num_found(world, *prompt) == in_pages, "what this step writes may be read in it"
        (entry,) = plan.scheduled
        world.scheduler.commit(entry, 7 if entry.samples else None)
        assert entry.request.num_computed_tokens == num_scheduled
        assert num_found(world, *prompt) == in_pages


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_a_page_that_a_sampled_token_fills_is_found_when_that_token_is_computed(max_tokens: int) -> None:
    world = World(prefix_caching=True)
    world.add("r", PAGE - 1, max_tokens=max_tokens)
    world.step()
    assert num_found(world, *(7,) * 9) == 0, "its keys and values are written by the next step, if there is one"
    world.step()
    assert num_found(world, *(7,) * 9) == (PAGE if max_tokens > 1 else 0)


def test_a_page_whose_last_token_is_not_known_yet_is_found_by_nobody() -> None:
    world = World(prefix_caching=True)
    request = world.add("r", PAGE - 1)
    for _ in range(2):  # the second step is planned before the token of the first is known
        (entry,) = world.scheduler.schedule().scheduled
        world.scheduler.advance(entry)
    assert request.num_computed_tokens == PAGE and request.num_pending_tokens == 2
    for last in (0, 7):
        assert num_found(world, 7, 7, 7, last, 7) == 0
    world.scheduler.settle(request, 7)
    assert num_found(world, 7, 7, 7, 7, 7) == PAGE
    assert num_found(world, 7, 7, 7, 0, 7) == 0


def test_what_a_request_left_in_an_unfinished_chunk_is_not_found_after_it_has_gone() -> None:
    world = World(budget=6, prefix_caching=True)
    world.add("gone", 20)
    world.step()
    world.scheduler.remove("gone")
    assert num_found(world, *(7,) * 20) == PAGE
    later = world.add("later", 20)
    world.step()
    assert later.num_cached_tokens == PAGE and later.num_computed_tokens == PAGE + 6
