"""Pages: shared, found by hash, handed out in the right order, never lost."""

from __future__ import annotations

import random

import pytest

from lorafleet.workers.scheduling.block_pool import BlockPool


def page_hash(text: str) -> bytes:
    return text.encode()


def filled(pool: BlockPool, text: str) -> list[int]:
    """Return a pool with pages hashed a0, a1, ... for "a2"."""
    pages = pool.allocate(int(text[1:]))
    assert pages is not None
    for number, page in enumerate(pages):
        pool.set_hash(page, page_hash(f"{text[0]}{number}"))
    return pages


def hashes(text: str, num: int) -> list[bytes]:
    return [page_hash(f"{text}{number}") for number in range(num)]


def test_all_or_nothing_is_allocated() -> None:
    pool = BlockPool(4)
    pages = pool.allocate(3)
    assert pages is not None and pool.num_free == 1
    assert pool.allocate(2) is None and pool.num_free == 1
    assert pool.allocate(0) == []
    pool.free(pages)
    assert pages == [] and pool.num_free == 4


def test_a_page_is_found_while_it_is_held_and_after_it_was_freed() -> None:
    pool = BlockPool(4)
    first = filled(pool, "a2")
    kept = list(first)
    assert pool.find(hashes("a", 3)) == kept
    second = pool.allocate(1, pool.find(hashes("a", 2)))
    assert second is not None and second[:2] == kept and pool.num_free == 1
    pool.check_integrity([first, second])
    pool.free(first)
    assert pool.num_free == 1, "the other one holds them still"
    pool.free(second)
    assert pool.num_free == 4 and pool.find(hashes("a", 2)) == kept
    pool.check_integrity([])


def test_only_the_longest_beginning_is_found() -> None:
    pool = BlockPool(4)
    pages = filled(pool, "a3")
    assert pool.find([page_hash("a0"), page_hash("x"), page_hash("a2")]) == pages[:1]
    assert pool.find([page_hash("x"), page_hash("a0")]) == []
    assert pool.find([]) == []


def test_empty_pages_are_handed_out_first_then_the_least_recently_used_and_tails_before_heads() -> None:
    pool = BlockPool(7)
    old, new, empty = filled(pool, "a2"), filled(pool, "b2"), pool.allocate(1)
    assert empty is not None
    order = [*empty, *reversed(old), *reversed(new)]
    for pages in (old, new, empty):
        pool.free(pages)
    never_used = [5, 6]
    taken = [page for _ in range(7) for page in pool.allocate(1) or ()]
    assert taken == [order[0], *never_used, *order[1:]]
    assert pool.find(hashes("a", 1)) == pool.find(hashes("b", 1)) == []


def test_what_is_found_again_counts_as_used() -> None:
    pool = BlockPool(4)
    a, b = filled(pool, "a2"), filled(pool, "b2")
    pool.free(a)
    pool.free(b)
    again = pool.allocate(0, pool.find(hashes("a", 2)))
    assert again is not None
    pool.free(again)
    assert pool.allocate(2) is not None
    assert pool.find(hashes("b", 1)) == [] and len(pool.find(hashes("a", 2))) == 2


def test_pages_to_be_shared_do_not_count_as_room_for_others() -> None:
    pool = BlockPool(3)
    pages = filled(pool, "a2")
    pool.free(pages)
    found = pool.find(hashes("a", 2))
    assert pool.allocate(2, found) is None and pool.num_free == 3
    pages = pool.allocate(1, found) or []
    assert len(set(pages)) == 3 and pool.num_free == 0
    pool.check_integrity([pages])


def test_of_two_pages_with_the_same_content_one_is_found() -> None:
    pool = BlockPool(2)
    one, other = pool.allocate(1), pool.allocate(1)
    assert one and other
    pool.set_hash(one[0], page_hash("a"))
    pool.set_hash(other[0], page_hash("a"))
    assert pool.find([page_hash("a")]) == one
    pool.free(one)
    pool.allocate(1)
    assert pool.find([page_hash("a")]) == []


def test_spoiled_pages_are_not_found() -> None:
    pool = BlockPool(2)
    pages = filled(pool, "a2")
    pool.spoil(pages)
    assert pool.find(hashes("a", 2)) == []
    pool.check_integrity([pages])


def test_room_is_counted_as_if_some_had_let_go() -> None:
    pool = BlockPool(6)
    a = filled(pool, "a2")
    b = pool.allocate(1, a) or []
    c = pool.allocate(1) or []
    assert pool.num_free == 2
    assert pool.num_free_without([b], set()) == 3, "the pages that a holds too stay held"
    assert pool.num_free_without([a, b], set()) == 5
    assert pool.num_free_without([a, b, c], set(a)) == 4
    pool.free(c)
    assert pool.num_free_without([], {5}) == 2


@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_done_nothing_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(12)
    holders: list[list[int]] = []
    for _ in range(500):
        if holders and rng.random() < 0.4:
            pages = holders.pop(rng.randrange(len(holders)))
            if rng.random() < 0.2:
                pool.spoil(pages)
            pool.free(pages)
        else:
            text = rng.choice("abc")
            wanted = rng.randrange(1, 6)
            found = pool.find(hashes(text, wanted))
            taken = pool.allocate(wanted - len(found), found)
            if taken is not None:
                holders.append(taken)
                for number in range(len(found), wanted):
                    pool.set_hash(taken[number], page_hash(f"{text}{number}"))
        pool.check_integrity(holders)
        assert pool.num_free == 12 - len({page for pages in holders for page in pages})
