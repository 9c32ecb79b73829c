"""Desired against observed workers, as a table."""

from __future__ import annotations

import pytest

from lorafleet.controller.reconcile import Actions, reconcile


@pytest.mark.parametrize(
    ("desired", "observed", "actions"),
    [
        ([], [], Actions((), ())),
        (["a", "b"], [], Actions(("a", "b"), ())),
        (["b", "a"], [], Actions(("b", "a"), ())),
        (["a", "b"], ["b"], Actions(("a",), ())),
        (["a"], ["a"], Actions((), ())),
        (["a"], ["c", "a", "b"], Actions((), ("b", "c"))),
        (["a"], ["b"], Actions(("a",), ("b",))),
        ([], ["b", "a"], Actions((), ("a", "b"))),
    ],
)
def test_what_to_create_and_what_to_remove(desired: list[str], observed: list[str], actions: Actions) -> None:
    assert reconcile(desired, observed) == actions


def test_doing_what_it_says_leaves_nothing_to_do() -> None:
    desired, observed = ["a", "b", "c"], {"b", "x"}
    actions = reconcile(desired, observed)
    assert reconcile(desired, (observed | set(actions.create)) - set(actions.remove)) == Actions((), ())
