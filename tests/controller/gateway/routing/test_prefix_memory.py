"""What a worker is thought to have computed."""

from __future__ import annotations

from lorafleet.controller.gateway.routing.prefix_memory import BLOCK, PrefixMemory, prefix_hashes

PROMPT = list(range(4 * BLOCK + 7))


def test_names_are_those_of_whole_blocks_and_of_all_before_them() -> None:
    hashes = prefix_hashes("anyone", PROMPT)
    assert len(hashes) == len(set(hashes)) == 4
    assert prefix_hashes("anyone", PROMPT[: 2 * BLOCK]) == hashes[:2]
    changed = prefix_hashes("anyone", [9, *PROMPT[1:]])
    assert not set(changed) & set(hashes)
    assert prefix_hashes("anyone", PROMPT[: BLOCK - 1]) == []


def test_nobody_finds_what_another_owner_has() -> None:
    assert not set(prefix_hashes("one", PROMPT)) & set(prefix_hashes("another", PROMPT))


def test_what_begins_like_a_prompt_that_was_sent_is_found() -> None:
    memory = PrefixMemory()
    hashes = prefix_hashes("anyone", PROMPT)
    assert memory.num_found(hashes) == 0
    memory.note(hashes, max_tokens=100 * BLOCK)
    assert memory.num_found(hashes) == 4 * BLOCK
    other = prefix_hashes("anyone", [*PROMPT[: 3 * BLOCK], *[5] * BLOCK])
    assert memory.num_found(other) == 3 * BLOCK
    memory.clear()
    assert memory.num_found(hashes) == 0


def test_the_longest_unused_goes_first_and_of_one_prompt_its_end() -> None:
    memory = PrefixMemory()
    old, new = prefix_hashes("old", PROMPT), prefix_hashes("new", PROMPT)
    memory.note(old, max_tokens=6 * BLOCK)
    memory.note(new, max_tokens=6 * BLOCK)
    assert memory.num_found(new) == 4 * BLOCK
    assert memory.num_found(old) == 2 * BLOCK
    memory.note(old[:2], max_tokens=6 * BLOCK)
    memory.note(prefix_hashes("third", PROMPT[: 2 * BLOCK]), max_tokens=6 * BLOCK)
    assert memory.num_found(old) == 2 * BLOCK
    assert memory.num_found(new) == 2 * BLOCK
