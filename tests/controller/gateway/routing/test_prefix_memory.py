"""The prefixes a worker has probably cached."""

from __future__ import annotations

from lorafleet.controller.gateway.routing.prefix_memory import BLOCK, PrefixMemory, prefix_hashes

PROMPT = list(range(4 * BLOCK + 7))


def test_a_hash_covers_whole_blocks_and_all_tokens_before_them() -> None:
    hashes = prefix_hashes("anyone", PROMPT)
    assert len(hashes) == len(set(hashes)) == 4
    assert prefix_hashes("anyone", PROMPT[: 2 * BLOCK]) == hashes[:2]
    changed = prefix_hashes("anyone", [9, *PROMPT[1:]])
    assert not set(changed) & set(hashes)
    assert prefix_hashes("anyone", PROMPT[: BLOCK - 1]) == []


def test_an_owner_does_not_find_another_ones_prefixes() -> None:
    assert not set(prefix_hashes("one", PROMPT)) & set(prefix_hashes("another", PROMPT))


def test_the_prefix_of_an_earlier_prompt_is_found() -> None:
    memory = PrefixMemory()
    hashes = prefix_hashes("anyone", PROMPT)
    assert memory.num_found(hashes) == 0
    memory.note(hashes, max_tokens=100 * BLOCK)
    assert memory.num_found(hashes) == 4 * BLOCK
    other = prefix_hashes("anyone", [*PROMPT[: 3 * BLOCK], *[5] * BLOCK])
    assert memory.num_found(other) == 3 * BLOCK
    memory.clear()
    assert memory.num_found(hashes) == 0


def test_the_least_recently_used_prompt_is_dropped_first_from_its_end() -> None:
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
