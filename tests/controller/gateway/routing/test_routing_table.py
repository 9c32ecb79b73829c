"""Reading the table and resolving names."""

from __future__ import annotations

import pytest

from lorafleet.controller.gateway.routing.routing_table import RoutingTable
from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.errors import UnknownModelError


def _table(*adapters: tuple[str, str, int]) -> RoutingTable:
    message = controller_pb2.RoutingTable(base=controller_pb2.BaseModel(names=["base", "alias"], root="/m"))
    for name, digest, version in adapters:
        message.adapters.add(name=name, digest=digest, version=version, parent="base")
    message.workers.add(worker_id="w", generation=3, address="h:1", state=worker_pb2.WORKER_DRAINING)
    return RoutingTable.from_wire(message)


def test_the_base_model_comes_first_and_adapters_by_name() -> None:
    table = _table(("z", "d1", 1), ("a", "d2", 1))
    assert list(table.models) == ["base", "alias", "a", "z"]
    assert table.base_name == "base"
    assert table.resolve("alias").digest == ""


def test_of_two_versions_the_higher_counts() -> None:
    assert _table(("a", "new", 2), ("a", "old", 1)).resolve("a").digest == "new"


def test_an_adapter_never_hides_the_base_model() -> None:
    assert _table(("base", "d", 9)).resolve("base").digest == ""


def test_a_workers_identity_is_id_generation_and_address() -> None:
    (worker,) = _table().workers
    assert worker.identity == ("w", 3, "h:1")
    assert worker.draining


def test_an_unknown_name_is_refused_with_similar_names() -> None:
    table = _table(("sql-adapter", "d", 1), ("pirate", "e", 1))
    with pytest.raises(UnknownModelError, match=r"no model 'sql_adapter'.*'sql-adapter'.*GET /v1/models"):
        table.resolve("sql_adapter")
    with pytest.raises(UnknownModelError) as failure:
        table.resolve("something else")
    assert "Did you mean" not in failure.value.message


def test_an_error_quotes_little_of_an_unknown_name() -> None:
    for name in ("x" * 5_000_000, "\x00" * 1000, "sql-adapte" + "r" * 1000):
        with pytest.raises(UnknownModelError) as failure:
            _table(("sql-adapter", "d", 1), ("r" * 256, "e", 1)).resolve(name)
        assert len(failure.value.message) < 1200


def test_the_weight_is_1_unless_the_table_has_one() -> None:
    message = controller_pb2.RoutingTable(base=controller_pb2.BaseModel(names=["base"]))
    message.adapters.add(name="a", digest="d", version=1, weight=0.25)
    message.adapters.add(name="b", digest="e", version=1)
    models = RoutingTable.from_wire(message).models
    assert (models["a"].weight, models["b"].weight) == (0.25, 1.0)


def test_an_adapter_without_a_digest_is_left_out_lest_the_base_model_answer() -> None:
    assert list(_table(("a", "", 1)).models) == ["base", "alias"]


def test_an_adapter_is_unavailable_when_every_worker_has_a_reason_to_lack_it() -> None:
    message = controller_pb2.RoutingTable(base=controller_pb2.BaseModel(names=["base"]))
    assert RoutingTable.from_wire(message).unavailable("d") is None, "no worker is there, so who knows"
    for number, reason in enumerate(("changed", "missing_directory")):
        worker = message.workers.add(worker_id=f"w{number}", address="h:1")
        worker.lacking.add(name="a", digest="d", reason=reason)
    assert RoutingTable.from_wire(message).unavailable("d") == "changed"
    assert RoutingTable.from_wire(message).unavailable("other") is None
    message.workers[1].lacking[0].reason = ""
    assert RoutingTable.from_wire(message).unavailable("d") is None, "one is loading it"
