"""Desired and observed workers and adapters compared, as tables."""

from __future__ import annotations

import pytest

from lorafleet.controller.fleet.reconcile import Actions, AdapterActions, reconcile, reconcile_adapters
from lorafleet.proto import worker_pb2


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


def sql(version: int, digest: str = "") -> worker_pb2.Adapter:
    return worker_pb2.Adapter(name="sql", version=version, digest=digest or f"d{version}")


GONE = worker_pb2.Adapter(name="sql", version=9, unloaded=True)
NOTHING = AdapterActions((), (), (), ())


@pytest.mark.parametrize(
    ("newest", "needed", "registered", "noted", "staging", "all_heard", "actions"),
    [
        (None, [], [], 0, [], True, NOTHING),
        (sql(5), [], [sql(5)], 5, [], True, NOTHING),
        (sql(5), [], [], 0, [], True, AdapterActions((sql(5),), (sql(5),), (), ())),
        (sql(5), [], [], 5, [], False, AdapterActions((), (sql(5),), (), ())),
        (sql(5), [], [sql(5)], 4, [], True, AdapterActions((sql(5),), (), (), ())),
        # An older one may still be needed anywhere; each worker keeps it until it is dropped everywhere.
        (sql(5), [], [sql(4), sql(5)], 5, [], True, AdapterActions((), (), (), (sql(4),))),
        (sql(5), [sql(4)], [sql(4), sql(5)], 5, [], True, NOTHING),
        (sql(5), [sql(4)], [sql(5)], 5, [], True, AdapterActions((), (sql(4),), (), ())),
        # Unloaded: nothing is loaded, and existing versions are retired in the same way.
        (GONE, [], [sql(5)], 5, [], True, AdapterActions((GONE,), (), (), (sql(5),))),
        (GONE, [], [], 9, [], True, NOTHING),
        # No worker has noted it: a load in progress, or left over from one, or the newest version, not heard of yet.
        (sql(5), [], [sql(5), sql(6)], 5, [("sql", 6)], True, NOTHING),
        (sql(5), [], [sql(5), sql(6)], 5, [], True, AdapterActions((), (), (("sql", 6),), ())),
        (sql(5), [], [sql(5), sql(6)], 5, [], False, NOTHING),
        (None, [], [sql(6)], 0, [], True, AdapterActions((), (), (("sql", 6),), ())),
        (None, [], [sql(6)], 0, [], False, NOTHING),
        # Other content under the same version: its files had changed when the worker read them.
        (sql(1), [], [sql(1, "other")], 1, [], True, AdapterActions((), (), (("sql", 1),), ())),
    ],
)
def test_actions_that_make_a_workers_adapters_those_of_the_fleet(
    newest: worker_pb2.Adapter | None,
    needed: list[worker_pb2.Adapter],
    registered: list[worker_pb2.Adapter],
    noted: int,
    staging: list[tuple[str, int]],
    all_heard: bool,
    actions: AdapterActions,
) -> None:
    assert actions == reconcile_adapters(
        {} if newest is None else {"sql": newest},
        needed,
        {(adapter.name, adapter.version): adapter for adapter in registered},
        {"sql": noted} if noted else {},
        staging=staging,
        all_heard=all_heard,
    )
