"""Names similar to an unknown one."""

from __future__ import annotations

import difflib

import pytest

from lorafleet.controller.gateway.routing.near_names import NearNames

THOUSANDS = [f"customer-{number:04}/support" for number in range(5000)]


@pytest.mark.parametrize(
    "name",
    [
        "Customer-0042/support",
        "ustomer-0042/support",
        "customer0042/support",
        "customer-0042/suport",
        "customer-0042",
        "customer-0042/support-v2",
        "CUSTOMER-0042/SUPPORT",
        "cutsomer-0042/support",
    ],
)
def test_they_are_found_among_thousands(name: str) -> None:
    near = NearNames(THOUSANDS).of(name)
    assert len(near) == 3
    assert "customer-0042/support" in near


def test_the_most_similar_comes_first_in_its_own_case() -> None:
    assert NearNames(["Pirate", "pirates", "base"]).of("PIRATE") == ["Pirate", "pirates"]


def test_odd_names_match_nothing() -> None:
    for name in ("", "?", "x" * 10_000, "\x00"):
        assert NearNames(["base", "pirate"]).of(name) == []
    assert NearNames([]).of("base") == []


def test_few_names_are_compared_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def watch(word: str, possibilities: dict[str, str], *rest: object, **options: object) -> list[str]:
        compared.append((len(word), len(possibilities)))
        return []

    monkeypatch.setattr(difflib, "get_close_matches", watch)
    near = NearNames(THOUSANDS)
    for name in ("customer-2500/suport", "z" * 5_000_000):
        near.of(name)
    assert all(num_chars <= 128 and num_names <= 32 for num_chars, num_names in compared)
