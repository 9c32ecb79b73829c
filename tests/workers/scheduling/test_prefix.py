"""Hashes of pages: the same for the same content of the same owner, and for nothing else."""

from __future__ import annotations

from itertools import product

from lorafleet.workers.scheduling.prefix import extend_hashes, parting_hash, root_hash


def hashes(root: bytes, token_ids: list[int], page_size: int = 4) -> list[bytes]:
    found: list[bytes] = []
    extend_hashes(found, root, token_ids, page_size, len(token_ids) // page_size)
    return found


def test_roots_differ_by_tenant_salt_and_adapter_however_their_parts_are_cut() -> None:
    parts = ["", "a", "ab", "b", "', '", "\0"]
    roots = {root_hash(*owner) for owner in product(parts, parts, [None, "None", *parts])}
    assert len(roots) == 6 * 6 * 8


def test_a_name_stands_for_everything_up_to_its_page() -> None:
    root = root_hash("", "", None)
    tokens = list(range(100, 112))
    assert hashes(root, tokens) == hashes(root, list(tokens))
    assert hashes(root, [*tokens[:4], 5, *tokens[5:]])[0] == hashes(root, tokens)[0]
    assert set(hashes(root, [*tokens[:4], 5, *tokens[5:]])[1:]).isdisjoint(hashes(root, tokens))
    assert set(hashes(root_hash("t", "", None), tokens)).isdisjoint(hashes(root, tokens))
    assert len(set(hashes(root, [7] * 12))) == 3, "equal pages at other places are others"


def test_names_are_extended_without_being_made_again() -> None:
    root = root_hash("", "", "digest")
    tokens = list(range(40))
    growing: list[bytes] = []
    for num_pages in (0, 1, 1, 3, 10):
        extend_hashes(growing, root, tokens, 4, num_pages)
        assert len(growing) == num_pages
    assert growing == hashes(root, tokens)


def parted(start: int, adapter: str = "digest", page_size: int = 4) -> list[bytes]:
    found: list[bytes] = []
    tokens = list(range(40))
    for num_pages in (3, 10):
        extend_hashes(
            found,
            root_hash("", "", None),
            tokens,
            page_size,
            num_pages,
            parting=parting_hash(adapter, start),
            start=start,
        )
    return found


def test_pages_are_the_base_models_up_to_where_an_adapter_begins() -> None:
    base = hashes(root_hash("", "", None), list(range(40)))
    for start, num_shared in ((1, 0), (3, 0), (4, 1), (7, 1), (8, 2), (13, 3), (39, 9), (40, 10)):
        found = parted(start)
        assert found[:num_shared] == base[:num_shared]
        assert set(found[num_shared:]).isdisjoint(base)
    assert set(parted(5)[1:]).isdisjoint(parted(6)), "one page, the same tokens, but not the same content"
    assert set(parted(5)[1:]).isdisjoint(parted(5, adapter="other"))
    assert parted(5) == parted(5)
