"""What of the controller's Ray calls can be decided without a Ray."""

from __future__ import annotations

import pytest

from lorafleet.controller.cluster import homes


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"a": 2.0, "b": 2.0}, ["a", "b", "a", "b"]),
        ({"a": 1.0, "b": 3.0, "head": 1.5}, ["a", "b", "head", "b", "b"]),
        ({"head": 0.0, "a": 1.0}, ["a"]),
        ({"head": 0.5}, []),
        ({}, []),
    ],
)
def test_workers_go_to_each_node_in_turn_while_it_has_room(sizes: dict[str, float], expected: list[str]) -> None:
    assert homes(sizes) == expected
